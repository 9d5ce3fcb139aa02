"""Write part of CIFAR-10 as a folder of PNG files, as one's own pictures would lie:

python recipes/write_folder.py FOLDER TRAIN VAL     so many pictures of each class
"""

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import UserError, cifar, run_script, user_errors  # noqa: E402

SIDE = 64


def main() -> None:
    if len(sys.argv) != 4 or not all(count.isdigit() for count in sys.argv[2:]):
        raise UserError("expected FOLDER TRAIN VAL: a folder and two numbers of pictures a class")
    folder, *counts = sys.argv[1:]
    arrays = cifar.load("CIFAR10", "data/")
    for split, source, count in zip(("train", "val"), ("train", "test"), counts, strict=True):
        images, labels = arrays[f"{source}_images"], arrays[f"{source}_labels"]
        for label, name in enumerate(cifar.CLASS_NAMES["CIFAR10"]):
            place = Path(folder, split, name)
            with user_errors(place):
                place.mkdir(parents=True, exist_ok=True)
            rows = (labels == label).nonzero()[: int(count), 0].tolist()
            for row in rows:
                picture = Image.fromarray(images[row].numpy())
                picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{row}.png")


if __name__ == "__main__":
    run_script(main)
