"""Which patches are seen and which are hidden, at random."""

from __future__ import annotations

from torch import Tensor


def split(noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The indices of the ``kept`` smallest values and of the others: (B, N) -> (B, kept), (B, N - kept).

    Both are in the random order that the noise gives them, not sorted.
    """
    order = noise.argsort(dim=1)
    return order[:, :kept], order[:, kept:]
