"""Tiny ImageNet (Stanford CS231n): 200 classes, 64 x 64, as ``tiny-imagenet-200.zip`` unpacks.

``train/WNID/images/*.JPEG``; ``val/images/*.JPEG`` with labels in ``val/val_annotations.txt``, or sorted into
``val/WNID/``. The test split has no labels and is not used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.data import DataError, Split, needed, shown
from workers.data.files import Files, class_folders, file_name, subfolders

FOLDER = "tiny-imagenet-200"


def load(split: Split, root: Path | None = None, **_: Any) -> Files:
    """``root`` is the unpacked folder or the one that holds it. Labels follow the alphabet of the WordNet ids."""
    layout = "train/WNID/images/*.JPEG and val/val_annotations.txt (tiny-imagenet-200.zip, unpacked) in it"
    root = needed(root, "tiny_imagenet", layout)
    if (root / FOLDER).is_dir():
        root = root / FOLDER
    annotations = root / "val" / "val_annotations.txt"
    if split == "train" or not annotations.is_file():
        return class_folders(root, split)
    classes = subfolders(root / "train")
    place = {wnid: label for label, wnid in enumerate(classes)}
    names, labels = [], []
    for line in annotations.read_text().splitlines():
        name, _tab, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in place:
            raise DataError(f"{shown(annotations)}: {line!r}: train/ has no class {wnid!r}")
        names.append(file_name(name, annotations))
        labels.append(place[wnid])
    if not names:
        raise DataError(f"{shown(annotations)}: empty")
    return Files(root / "val" / "images", names, labels, classes)
