#!/bin/sh
# sdhd 0.1.0: resume_training() takes the weights of a checkpoint and nothing else. The optimizer's state is
# in the file and is not read, epochs count from 1 again, and the best accuracy is forgotten: the first
# epoch after it writes over best_model.pth, however bad it is. Seen: a checkpoint of accuracy 1.0, resumed
# for an epoch of wrong labels, is replaced by one of 0.77; history begins with epoch 1; with momentum the
# weights after 1 + 1 epochs are others than after 2 (by 0.55), without they are the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 sdhd==0.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import dataclasses
import sys

import torch
from sdhd.config import TrainerConfig
from sdhd.training import resume_training, train_classifier

torch.manual_seed(0)
images = torch.randn(64, 8)
labels = (images[:, 0] > 0).long()
batches = [(images, labels)] * 20  # the same order each time
plain = TrainerConfig(
    epochs=1, lr=0.1, weight_decay=0, mixed_precision=False, compile_model=False, use_nesterov=False,
    output_dir="run", save_best_only=True,
)  # fmt: skip


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 2)


def parted_and_whole(momentum):
    config = dataclasses.replace(plain, momentum=momentum)
    whole = model()
    train_classifier(whole, batches, batches, dataclasses.replace(config, epochs=2, output_dir=None))
    first = train_classifier(model(), batches, batches, config)
    parted = model()
    second = resume_training(parted, first.best_checkpoint_path, batches, batches, config)
    difference = (parted.weight - whole.weight).abs().max().item()
    print("momentum", momentum, "difference of weights", difference, "epoch", second.history[0].epoch)
    return difference, second.history[0].epoch


with_momentum, epoch = parted_and_whole(0.9)
without, _ = parted_and_whole(0.0)
good = train_classifier(model(), batches, batches, dataclasses.replace(plain, epochs=10))
wrong = [(images, labels.flip(0))] * 20
resume_training(model(), good.best_checkpoint_path, wrong, batches, plain)
with torch.serialization.safe_globals([TrainerConfig]):
    kept = torch.load("run/best_model.pth", weights_only=True)["val_accuracy"]
print("best before", good.best_val_accuracy, "best_model.pth now", kept)
sys.exit(0 if with_momentum > 1e-2 and without < 1e-6 and epoch == 1 and kept < good.best_val_accuracy else 1)
END
