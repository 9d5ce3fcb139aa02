#!/bin/sh
# torchdata 0.11.0: a StatefulDataLoader that goes on in the middle of an epoch gives the right images, but
# the random crops and flips that its workers drew for the first images of that epoch, once more: the
# workers are seeded anew with the epoch's seed. Without workers, and with a generator of its own, the
# augmentation is right, but the next epochs come in another order than without the interruption.
# Seen, 24 images, batches of 4, interrupted behind the fourth: both remaining ones are augmented with the
# numbers of batches before the interruption (two workers); all batches of the next epoch are others (none).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchdata==0.11.0 numpy==2.4.6
cat > "$folder/resume.py" <<'END'
import sys
import warnings

import torch

warnings.simplefilter("ignore")
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402


class Numbered(torch.utils.data.Dataset):
    """Gives an image's number and the random number that an augmentation would draw for it."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.tensor([index, torch.randint(0, 1_000_000, ()).item()])


def make(workers):
    torch.manual_seed(0)
    order = torch.Generator().manual_seed(1)
    return StatefulDataLoader(Numbered(), 4, shuffle=True, num_workers=workers, generator=order)


def run(workers, interrupted):
    loader, batches = make(workers), []
    for batch in loader:
        batches.append(batch)
        if interrupted and len(batches) == 4:
            state, random = loader.state_dict(), torch.get_rng_state()
            loader = make(workers)
            loader.load_state_dict(state)
            torch.set_rng_state(random)
            batches += list(loader)
            break
    return torch.stack(batches + list(loader)).unbind(-1)


def same(a, b):
    return [torch.equal(x, y) for x, y in zip(a, b, strict=True)]


if __name__ == "__main__":
    images, drawn = run(2, False)
    images_resumed, drawn_resumed = run(2, True)
    again = [any(torch.equal(x, y) for y in drawn[:4]) for x in drawn_resumed[4:6]]
    print("two workers: images", same(images, images_resumed), "drawn before already", again)
    workers = all(same(images, images_resumed)) and all(again)
    images, drawn = run(0, False)
    images_resumed, drawn_resumed = run(0, True)
    order = same(images, images_resumed)
    print("no workers: images", order, "drawn", same(drawn, drawn_resumed))
    alone = order == [True] * 6 + [False] * 6 and all(same(drawn, drawn_resumed))
    sys.exit(0 if workers and alone else 1)
END
cd "$folder"
"$folder/venv/bin/python" resume.py
