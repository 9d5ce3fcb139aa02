"""A page that runs an exported network in the browser: one HTML file, plain JavaScript."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = Path(__file__).with_name("browser.html")
SHOWN = 20  # test images that can be chosen; the rest are only sorted by their blocks


def page(
    title: str, facts: Mapping[str, Any], images: np.ndarray, labels: Sequence[int], is_small: bool
) -> str:
    """The page's HTML. It loads model.onnx and the runtime's files in ort/ beside it.

    facts: about, classes, size, resized, stages, penalty_input, fixed_flops, block_flops,
    full_flops. images: (N, H, W, 3) bytes, as the network takes them. is_small: pixels are shown as
    squares.
    """
    shown = [
        {"bytes": base64.b64encode(image.tobytes()).decode(), "label": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]
    content = json.dumps({**facts, "images": shown, "shown": SHOWN}).replace("<", "\\u003c")
    return (
        TEMPLATE.read_text()
        .replace("__TITLE__", html.escape(title))
        .replace("__RENDERING__", "pixelated" if is_small else "auto")
        .replace("__FACTS__", content)
    )
