"""Pictures a second of one core, from JPEG files to batches: ours against Pillow + torchvision's first transforms.

    python benchmarks/loader.py [--folder JPEGS] [--rounds N]

A random resized crop to 224 (bicubic) and a flip. The plain side also makes floats and normalises each picture, as its
recipe does; ours leaves that to the device, and is measured with it as well. Everything runs in this process, on one
thread, in turns; CPU time, the best round of each. Both sides must decode to the same pixels before anything is timed.
The folder: foolbox's 20 pictures of ImageNet where that package is installed, else scikit-learn's two photographs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from contract.settings import Data, Settings
from workers.data import decode, load
from workers.data.cache import decoded
from workers.data.files import Files
from workers.data.loader import train_loader
from workers.engine import distributed, pictures
from workers.transforms.crops import RandomResizedCrop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 20


def photographs() -> list[Path]:
    for package, folder, pattern in (("foolbox", "data", "imagenet_*.jpg"), ("sklearn", "datasets/images", "*.jpg")):
        found = importlib.util.find_spec(package)
        if found is not None and found.submodule_search_locations:
            return sorted((Path(found.submodule_search_locations[0]) / folder).glob(pattern))
    sys.exit("neither foolbox nor scikit-learn is installed; give --folder")


def sides(root: Path) -> dict[str, Callable[[], Any]]:
    """What is timed: each makes one pass."""
    plain = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    theirs = DataLoader(torchvision.datasets.ImageFolder(str(root / "train"), plain), BATCH, shuffle=True)
    files = load("imagefolder", "train", root)
    assert isinstance(files, Files)
    normalise = pictures.normaliser(Settings(worker="main_lmim", data=Data(mean=list(MEAN), std=list(STD))))

    def ours(source: Any) -> DataLoader[Any]:
        return train_loader(source, RandomResizedCrop(224), BATCH, seed=0, rank=0, world=1, fold=distributed.fold)

    from_files = ours(files)
    whole, small = (ours(decoded(files, side, root / "cache")) for side in (None, 256))

    def without_simplejpeg() -> None:
        fast, decode.simplejpeg = decode.simplejpeg, None
        list(from_files)
        decode.simplejpeg = fast

    found: dict[str, Callable[[], Any]] = {
        "Pillow + torchvision v1": lambda: list(theirs),
        "ours": lambda: list(from_files),
        "ours, normalised on this core too": lambda: [normalise(x) for x, _, _ in from_files],
        "ours, from the cache": lambda: list(whole),
        "ours, from the cache at 256": lambda: list(small),
    }
    if decode.simplejpeg is not None:
        found["ours, without simplejpeg"] = without_simplejpeg
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(args.folder.glob("*.[jJ][pP]*[gG]")) if args.folder else photographs()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train" / "all").mkdir(parents=True)
        for n in range(BATCH * -(-len(files) // BATCH)):  # whole batches
            shutil.copy(files[n % len(files)], Path(folder) / "train" / "all" / f"{n:06d}.jpg")
        for path in files:
            plain = np.array(Image.open(path).convert("RGB"))
            assert (decode.read_rgb(path).permute(1, 2, 0).numpy() == plain).all(), (
                f"{path}: other pixels than Pillow's"
            )
        timed = sides(Path(folder))
        number = len(list((Path(folder) / "train" / "all").iterdir()))
        best = dict.fromkeys(timed, float("inf"))
        for _ in range(args.rounds + 1):  # one more than asked for, to warm up
            for name, once in timed.items():
                start = time.process_time()
                once()
                best[name] = min(best[name], time.process_time() - start)
    size = Image.open(files[0]).size
    print(f"{len(files)} JPEGs, {size[0]} x {size[1]} and alike; torch {torch.__version__}, Pillow {PIL.__version__}")
    reference = best["Pillow + torchvision v1"]
    for name, seconds in best.items():
        print(f"{name:36s} {number / seconds:7.0f} pictures/s   x {reference / seconds:.2f}")


if __name__ == "__main__":
    main()
