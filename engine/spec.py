"""What the engine has to know of a model."""

from typing import Protocol


class Spec(Protocol):
    """A model name spelt out, as `models.config` gives it."""

    name: str
    depth: int
    num_classes: int
    num_blocks: int
    dataset: str
    has_pictures: bool
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
