"""SimCLR's linear evaluation on features that were computed once: softmax regression by Adam, in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pulse


@dataclass(frozen=True)
class Fitted:
    weight: Tensor  # (classes, D)
    bias: Tensor  # (classes,)
    curve: Tensor  # (epochs, 2) loss and top-1 of the batches as they were trained on
    loss: float  # on the validation features
    top1: float


def logistic(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    weight: Tensor,
    *,
    epochs: int = 500,
    lr: float = 3e-4,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    batch_means: bool = False,
) -> Fitted:
    """Features (n, D) and labels (n,) of both splits, the first weights (classes, D); the bias begins at 0.

    The order of the training features is that of every epoch. ``batch_means`` averages over batches, whatever their
    size, as published; else every picture weighs the same.
    """
    weight, bias = weight.clone().requires_grad_(), weight.new_zeros(len(weight)).requires_grad_()
    adam = torch.optim.Adam([weight, bias], lr=lr, weight_decay=weight_decay, fused=True)
    batches = _batches(train, batch_size)
    weights = _weights([len(y) for _, y in batches], batch_means)
    curve = torch.zeros(epochs, 2, device=weight.device)
    for epoch in range(epochs):
        pulse.beat()
        for (x, y), share in zip(batches, weights, strict=True):
            logits = F.linear(x, weight, bias)
            loss = F.cross_entropy(logits, y)
            weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            adam.step()
            curve[epoch] += share * _seen(logits, y, loss)
    with torch.no_grad():
        measured = torch.zeros(2, device=weight.device)
        parts = _batches(val, batch_size)
        for (x, y), share in zip(parts, _weights([len(y) for _, y in parts], batch_means), strict=True):
            logits = F.linear(x, weight, bias)
            measured += share * _seen(logits, y, F.cross_entropy(logits, y))
    loss_, top1 = measured.tolist()
    return Fitted(weight.detach(), bias.detach(), curve, loss_, top1)


def _batches(pairs: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(pairs[0], size), torch.split(pairs[1], size), strict=True))


@torch.no_grad()
def _seen(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    return torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])


def _weights(sizes: list[int], alike: bool) -> list[float]:
    return [1 / len(sizes) if alike else size / sum(sizes) for size in sizes]
