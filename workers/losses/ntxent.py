"""The loss of SimCLR (Chen et al., ICML 2020, eq. 1): find the other view of a picture among all views of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def similarities(mine: Tensor, everyone: Tensor, place: Tensor, temperature: float) -> Tensor:
    """(n, C) against (N, C), all of length 1 -> (n, N) cosines over temperature; -inf for a view and itself.

    Row i of ``mine`` is row ``place[i]`` of ``everyone``.
    """
    logits = mine @ everyone.T / temperature
    return logits.scatter(1, place[:, None], -torch.inf)


def ntxent(logits: Tensor, positive: Tensor) -> Tensor:
    """The mean over views of -log softmax at the other view of the same picture: (n, N), (n,)."""
    return (logits.logsumexp(1) - logits.gather(1, positive[:, None])[:, 0]).mean()


@torch.no_grad()
def accuracy(logits: Tensor, positive: Tensor, top: int) -> Tensor:
    """How often the other view is among the ``top`` nearest."""
    return ((logits > logits.gather(1, positive[:, None])).sum(1) < top).float().mean()


def pairs(views: int, rank: int = 0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Of a process with ``views`` views, the first ones of its pictures before the second: where they are, and where
    their partners are, (n,) each, among those of all processes one after the other."""
    place = torch.arange(views, device=device)
    return place + rank * views, (place + views // 2) % views + rank * views
