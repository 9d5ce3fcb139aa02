"""What a checkpoint does with every image, kept beside it for the next time."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from . import bases, data, dependence, loop, storage
from .process import UserError
from .trained import TrainedModel

FORM = "most_frequent"  # of what is kept: another word for its figures, and they are found anew


class Predictions:
    """A checkpoint and what it does with every image."""

    def __init__(self, path: str, args):
        found = storage.read(path)
        self.made_with = found.args
        model = found.model or args.model  # released checkpoints do not say
        penalty = args.penalty if found.can_choose else None
        own = argparse.Namespace(
            **vars(args) | {"load": path, "model": model, "policy": None, "penalty": penalty}
        )
        self.path, self.config = Path(path), data.config_of(own)
        self.trained = TrainedModel(own, self.config)
        _, self.test = data.load(self.config, own, self.trained.device, training=False)
        content = self._predictions()
        self.policies, self.labels, self.correct, self.full_correct = (
            content[name].numpy() for name in ("policy", "label", "correct", "full_correct")
        )
        self.dependence = content["dependence"]
        self.fixed, self.per_block = self.trained.flops()
        self.flops = self.fixed + float((self.policies @ self.per_block.numpy()).mean())

    @property
    def kind(self) -> str:
        return self.trained.kind

    @property
    def superclasses(self) -> Mapping[str, Sequence[str]]:
        """The data set's classes that are alike, by name; of most data sets there are none."""
        known = data.DATA_SETS.get(self.config.dataset)
        return known.superclasses if known else {}

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def full_flops(self) -> float:
        """FLOPs of the full ResNet, without what decides."""
        return self.fixed - self.trained.decision_flops() + float(self.per_block.sum())

    def _predictions(self) -> dict[str, Any]:
        """What `_predict` finds, from the cache beside the checkpoint if it is of the same."""
        cache = storage.newest(self.path).with_suffix(".predictions.pt")
        networks = filter(None, (self.trained.resnet, self.trained.policy))
        key = [bases.fingerprint(network) for network in networks]
        key += [FORM, self.test.fingerprint(), self.trained.args.precision]
        key += [
            self.trained.args.penalty,
            self.config.image_size,
            list(self.config.mean),
            list(self.config.std),
        ]
        key += [sorted(self.trained.resnet.always_on)] if self.config.gated else []
        try:
            content = storage.content(cache)
        except UserError:  # none yet, or a damaged one
            content = {}
        if content.get("key") == key and "dependence" in content:
            return content
        content = {"key": key, **self._predict()}
        try:
            storage.write(content, cache)
        except UserError as error:
            print(f"{error}: the next report has to predict again", file=sys.stderr)
        return content

    def _predict(self) -> dict[str, Any]:
        """Of every image: policy, label, whether it is recognised, and whether in full; and what
        the policies owe to the image where a policy network decides.
        """

        def step(images: Tensor, labels: Tensor):
            logits, policy = self.trained.run(images)
            full = self.trained.plain(images)
            return {
                "policy": policy,
                "label": labels,
                "correct": logits.argmax(1) == labels,
                "full_correct": full.argmax(1) == labels,
            }

        label = f"predicting {self.folder.name}"
        found = loop.evaluate(step, self.test, self.trained.args.precision, label).final
        owed = {}
        if self.trained.looks:
            names = ("policy", "correct", "full_correct")
            owed = dependence.measure(self.trained, self.test, *(found[name] for name in names))
        return {**found, "dependence": owed}
