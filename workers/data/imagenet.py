"""ImageNet-1k (Russakovsky et al., 2015), as its archives unpack or sorted into class folders.

Devkit: ``train/WNID/*``, ``val/ILSVRC2012_val_00000001.JPEG`` and on, with ``meta.mat`` and the ground truth of the
development kit; a label is ILSVRC2012_ID - 1. Class folders: ``train/WNID/*`` and ``val/WNID/*``; labels follow the
alphabet. What lies in ``val/`` decides, for both splits.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from workers.data import DataError, Split, needed, shown
from workers.data.files import Files, class_folders, subfolders

log = logging.getLogger(__name__)

DEVKIT = ("anno", "ILSVRC2012_devkit_t12/data", "devkit/data")
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def load(split: Split, root: Path | None = None, *, wnids: list[str] | None = None, **_: Any) -> Files:
    """All classes, or only ``wnids``, in their order."""
    root = needed(root, "imagenet", f"train/WNID/*.JPEG, val/ and either val/WNID/ or {DEVKIT[0]}/meta.mat in it")
    kit = next((root / place for place in DEVKIT if (root / place / "meta.mat").is_file()), None)
    val = root / "val"
    flat = val.is_dir() and not subfolders(val)
    if flat and kit is None:
        raise DataError(
            f"{shown(val)}: no class folders, and no meta.mat in {' or '.join(DEVKIT)}; "
            "unpack ILSVRC2012_devkit_t12.tar.gz beside it, or sort the pictures into val/WNID/"
        )
    if kit is None or (val.is_dir() and not flat):
        log.info("%s: class folders; labels in the order of the alphabet", shown(root))
        return class_folders(root, split, wnids)
    log.info("%s: development kit; labels are ILSVRC2012_ID - 1", shown(root))
    everyone = read_wnids(kit / "meta.mat")
    classes = wnids or everyone
    if split == "train":
        return class_folders(root, split, classes)
    if not val.is_dir():
        raise DataError(f"data_path={shown(root)}: has no folder 'val'; expected val/ILSVRC2012_val_00000001.JPEG")
    return _flat(val, kit / TRUTH, everyone, classes)


def read_wnids(path: Path) -> list[str]:
    """``meta.mat`` -> the WordNet ids of its leaves, in the order of ILSVRC2012_ID, which starts at 1."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        order = np.argsort(leaves["ILSVRC2012_ID"].astype(int))
        if leaves["ILSVRC2012_ID"][order].tolist() != list(range(1, len(leaves) + 1)):
            raise ValueError("the ids of the leaves are not 1, 2, 3, ...")
        return [str(wnid) for wnid in leaves["WNID"][order]]
    except Exception as error:  # scipy raises whatever a damaged file leads it to
        raise DataError(f"{shown(path)}: not the development kit's meta.mat ({error})") from None


def _flat(val: Path, truth: Path, everyone: list[str], classes: list[str]) -> Files:
    """The validation pictures in the order of their numbers; line N of the ground truth belongs to number N."""
    try:
        ids = [int(line) for line in truth.read_text().split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(truth)}: unreadable ({error})") from None
    if ids and not 1 <= min(ids) <= max(ids) <= len(everyone):
        raise DataError(f"{shown(truth)}: ids from {min(ids)} to {max(ids)}, but meta.mat has {len(everyone)} classes")
    place = {wnid: label for label, wnid in enumerate(classes)}
    names, labels = [], []
    with os.scandir(val) as entries:
        found = sorted(name for e in entries if VAL_NAME.fullmatch(name := e.name))
    for name in found:
        number = int(name[-13:-5])
        if not 1 <= number <= len(ids):
            raise DataError(f"{shown(val / name)}: no such line in {truth.name}, which has {len(ids)}")
        if (wnid := everyone[ids[number - 1] - 1]) in place:
            names.append(name)
            labels.append(place[wnid])
    if not names:
        raise DataError(f"{shown(val)}: no pictures; expected ILSVRC2012_val_00000001.JPEG")
    return Files(val, names, labels, classes)
