"""What a frozen encoder knows: features, nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from workers.models import Encoder
from workers.pooling.tokens import pool

from . import distributed, pulse

CHUNK = 1024  # queries whose similarities to the whole bank are held at a time


def features(
    encoder: Encoder, loader: DataLoader[Any], prepare: Callable[[Tensor], Tensor], kind: str = "gap"
) -> tuple[Tensor, Tensor]:
    """``encoded`` by a pooling of the last block's tokens, before the final norm: (n, D), (n,)."""
    encoder.eval()
    return encoded(lambda images: pool(encoder.tokens(images), kind), loader, prepare)


@torch.no_grad()
def encoded(
    read: Callable[[Tensor], Tensor], loader: DataLoader[Any], prepare: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """What ``read`` makes of all pictures of all ranks (n, ...), and their labels (n,), in the order of the data set.

    Every rank has all of it.
    """
    found = [(read(prepare(x)).float(), y, i) for x, y, i in loader]
    device = distributed.device()
    columns = [torch.cat([each[c].to(device) for each in found]) for c in range(3)]
    x, y, index = (distributed.gather(column) for column in columns)
    order = index.argsort()
    return x[order], y[order]


def leave_one_out(x: Tensor, labels: Tensor) -> float:
    """Share of pictures whose nearest *other* picture of the same set has their label; cosine.

    Latent MIM's own evaluation (1-NN inside the validation split; no training pictures).
    """
    x = F.normalize(x, dim=1)
    correct = 0
    for start in range(0, len(x), CHUNK):
        pulse.beat()
        similarity = x[start : start + CHUNK] @ x.T
        own = torch.arange(start, start + len(similarity), device=x.device)
        similarity[torch.arange(len(own), device=x.device), own] = -torch.inf
        correct += int((labels[similarity.argmax(1)] == labels[own]).sum())
    return correct / len(x)


def weighted_knn(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    labels: Tensor,
    *,
    k: Sequence[int],
    temperature: float,
    classes: int,
) -> dict[int, float]:
    """Top-1 of a vote of the k nearest pictures of the bank, weighted by exp(cosine / temperature), for each k.

    Wu et al., CVPR 2018, section 3.4; the protocol of DINO (Caron et al., ICCV 2021).
    """
    found = knn_grid(bank, bank_labels, query, labels, k=k, temperatures=[temperature], classes=classes)
    return {each: right for (each, _), right in found.items()}


def knn_grid(
    bank: Tensor,
    bank_labels: Tensor,
    query: Tensor,
    labels: Tensor,
    *,
    k: Sequence[int],
    temperatures: Sequence[float],
    classes: int,
) -> dict[tuple[int, float], float]:
    """The same for each (k, temperature), with one search."""
    bank, query = F.normalize(bank, dim=1), F.normalize(query, dim=1)
    correct = {(each, temperature): 0 for temperature in temperatures for each in k}
    for start in range(0, len(query), CHUNK):
        pulse.beat()
        similarity, nearest = (query[start : start + CHUNK] @ bank.T).topk(min(max(k), len(bank)), dim=1)
        votes, truth = bank_labels[nearest], labels[start : start + CHUNK]
        # less the largest similarity: the same vote, which cannot overflow
        weights = {t: ((similarity - similarity[:, :1]) / t).exp() for t in temperatures}
        for each, temperature in correct:
            score = torch.zeros(len(votes), classes, device=bank.device, dtype=bank.dtype)
            score.scatter_add_(1, votes[:, :each], weights[temperature][:, :each])
            correct[each, temperature] += int((score.argmax(1) == truth).sum())
    return {each: n / len(query) for each, n in correct.items()}
