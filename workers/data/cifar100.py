"""CIFAR-100 (Krizhevsky, 2009) with its 100 fine classes, 32 x 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.data import Split, cifar10


def load(split: Split, root: Path | None = None, *, download: bool = False, **_: Any) -> cifar10.Cifar:
    """Downloads only where ``download`` says so."""
    return cifar10.load(split, root, download=download, name="CIFAR100")
