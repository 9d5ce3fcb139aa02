"""Pictures a second and core from JPEG files to 224x224 pixels, by several libraries.

    python benchmarks/decoding.py --data_dir FOLDER     a folder with val/<class>/*.JPEG

All resize the short side to 256 and crop the centre. `ours` is what the loaders do; those that
give floats normalise, the others leave that to the device. OpenCV and simplejpeg take part where
they are installed. One thread, interleaved, medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from measure import machine, table

from engine import options, pictures, run_script
from engine.options import Parser


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="folder with val/<class>/*.JPEG")
    add("--images", type=options.count, default=300, help="how many pictures")
    add("--repeats", type=options.count, default=15, help="rounds")
    return parser.parse_args()


def contenders() -> dict:
    """Name -> a function of a file's path."""
    from PIL import Image
    from torchcodec.decoders import decode_image
    from torchvision import transforms
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    tensor = transforms.Compose([
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    crop_v2 = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])

    def pil(path):
        return crop(Image.open(path).convert("RGB"))

    def pil_draft(path):  # libjpeg decodes at a half or a quarter of the size; other pixels
        picture = Image.open(path)
        picture.draft("RGB", (256, 256))
        return torch.from_numpy(np.array(crop(picture.convert("RGB"))))

    def ours(path):
        return pictures.Pictures([(path, 0)], 224)[0, None]

    found = {
        "PIL, floats (the usual recipe)": lambda path: tensor(pil(path)),
        "PIL, bytes": lambda path: torch.from_numpy(np.array(pil(path))),
        "PIL with draft, bytes": pil_draft,
        "torchcodec": lambda path: crop_v2(decode_image(path)),
        "torchvision.io (deprecated)": lambda path: crop_v2(
            decode_jpeg(read_file(path), ImageReadMode.RGB)
        ),
        "ours: torchcodec, checked": ours,
    }
    try:
        import cv2

        cv2.setNumThreads(1)

        def opencv(path):
            picture = cv2.imread(path)
            scale = 256 / min(picture.shape[:2])
            size = [round(side * scale) for side in picture.shape[1::-1]]
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            top, left = ((side - 224) // 2 for side in picture.shape[:2])
            picture = picture[top : top + 224, left : left + 224, ::-1]
            return torch.from_numpy(np.ascontiguousarray(picture))

        found["OpenCV, INTER_AREA"] = opencv
    except ImportError:
        pass
    try:
        import simplejpeg

        def turbo(path):
            pixels = simplejpeg.decode_jpeg(Path(path).read_bytes())
            return crop_v2(torch.from_numpy(pixels).permute(2, 0, 1))

        found["simplejpeg, torchvision's resize"] = turbo
    except ImportError:
        pass
    return found


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    root = args.data_dir / "val"
    files = [path for path, _ in pictures.files_of(root, pictures.classes(root))][: args.images]
    calls = contenders()
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            for path in files:
                call(path)
            rates[name].append(len(files) / (time.perf_counter() - start))
    print(json.dumps(machine()))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    usual = next(iter(medians.values()))
    rows = [[name, f"{rate:.0f}", f"{rate / usual:.2f}"] for name, rate in medians.items()]
    print(table(["", "pictures/s and core", "over the usual recipe"], rows))


if __name__ == "__main__":
    run_script(main)
