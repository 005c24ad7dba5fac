"""CIFAR-10 (Krizhevsky, 2009), 32 x 32, through torchvision, which checks the files' md5 sums before it reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.data import DataError, Split, needed, shown


class Cifar:
    """(n, 32, 32, 3) uint8 and n labels, in memory."""

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str]):
        self.images, self.labels, self.classes = images, labels, classes

    @property
    def listed(self) -> bytes:
        return self.labels.numpy().tobytes()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].clone().permute(2, 0, 1), int(self.labels[index])


def load(split: Split, root: Path | None = None, *, download: bool = False, name: str = "CIFAR10", **_: Any) -> Cifar:
    """Downloads only where ``download`` says so."""
    import torchvision.datasets
    from filelock import FileLock

    published = getattr(torchvision.datasets, name)
    place = f"{published.base_folder}/ ({published.filename}, unpacked) in it"
    if download and root is not None:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # one process of those on this disk
            try:
                published(root, train=True, download=True)
            except (OSError, RuntimeError) as error:
                raise DataError(f"data.download=True: no {name} from {published.url} ({error})") from None
    root = needed(root, name.lower(), place)
    try:
        files = published(root, train=split == "train")
    except RuntimeError:
        raise DataError(
            f"data_path={shown(root)}: {name} is not there or damaged; expected {place}, "
            f"from {published.url}, or set data.download=True where there is a network"
        ) from None
    return Cifar(torch.from_numpy(files.data), torch.tensor(files.targets), list(files.classes))
