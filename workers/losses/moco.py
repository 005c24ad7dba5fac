"""Contrast with a queue of negatives (MoCo: He et al., CVPR 2020, eq. 1), for queries that are mixtures, too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Queued(NamedTuple):
    """What a set of queries has in common with the queue, computed once however often its order changes."""

    queries: Tensor  # (B, C) of length 1
    negatives: Tensor  # (B, K) cosines over temperature
    log_sum: Tensor  # (B,) logarithm of the sum of their exponentials


def against(queries: Tensor, queue: Tensor, temperature: float) -> Queued:
    """queries (B, C) and queue (K, C), all of length 1."""
    negatives = queries @ queue.T / temperature
    return Queued(queries, negatives, negatives.logsumexp(1))


def infonce(queued: Queued, keys: Tensor, temperature: float, order: Tensor | None = None) -> Tensor:
    """The mean over i of the cross-entropy between query ``order[i]``'s key i and the queue; keys (B, C).

    The same as the cross-entropy of 1 + K logits at place 0, but a new order needs no new product with the queue.
    """
    queries, log_sum = queued.queries, queued.log_sum
    if order is not None:
        queries, log_sum = queries[order], log_sum[order]
    positive = (queries * keys).sum(1) / temperature
    return (torch.logaddexp(positive, log_sum) - positive).mean()


@torch.no_grad()
def accuracy(queued: Queued, keys: Tensor, temperature: float, top: int) -> Tensor:
    """How often the positive is among the ``top`` of 1 + K."""
    positive = (queued.queries * keys).sum(1, keepdim=True) / temperature
    return ((queued.negatives > positive).sum(1) < top).float().mean()
