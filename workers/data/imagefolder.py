"""Any folder of class folders: ``ROOT/train/CLASS/*.jpg`` and ``ROOT/val/CLASS/*.jpg``; they may be nested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.data import Split, needed
from workers.data.files import Files, class_folders


def load(split: Split, root: Path | None = None, **_: Any) -> Files:
    """Files in the order of their names; a label is the place of the class among the sorted training folders."""
    root = needed(root, "imagefolder", "train/CLASS/PICTURE.jpg and val/CLASS/PICTURE.jpg in it")
    return class_folders(root, split)
