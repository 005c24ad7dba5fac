"""What every batched transform is: see ``views``."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Step:
    """One change to pictures (B, 3, H, W) in [0, 1]. ``numbers``: how many uniform numbers a picture needs for it."""

    numbers = 0

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> Any:
        """(B, numbers) in [0, 1), the pictures' (H, W), their maps (B, 1, H, W) -> a tuple of tensors."""
        raise NotImplementedError

    def apply(self, images: Tensor, draws: Any) -> Tensor:
        raise NotImplementedError

    def follow(self, maps: Tensor, draws: Any) -> Tensor:
        """What happens to a map of the pictures: it moves as their pixels move, and no more."""
        return maps

    def result(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (H, W) that comes out."""
        return size
