"""ImageNet-100: 100 classes of ImageNet-1k, drawn for CMC (Tian et al., ECCV 2020). A label is a place in that list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.data import Split, imagenet
from workers.data.files import Files

WNIDS = Path(__file__).with_name("imagenet100.txt").read_text().split()


def load(split: Split, root: Path | None = None, **_: Any) -> Files:
    """Filtered out of the whole of ImageNet-1k, in either of its layouts; a folder of the 100 classes will do."""
    return imagenet.load(split, root, wnids=WNIDS)
