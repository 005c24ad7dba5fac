"""An early-stopped linear read-out of frozen features (Weiler et al., arXiv 2404.08526)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.settings.main_eyemim import Readout

from . import distributed


class EarlyStopping:
    """Stop after ``patience`` epochs in a row that lowered the best loss by less than ``min_delta``, or not at all.

    The best is the lowest, however little below the one before.
    """

    def __init__(self, patience: int, min_delta: float):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.count = math.inf, 0

    def see(self, loss: float) -> bool:
        """Whether this is the best so far."""
        better = loss < self.best
        self.count = 0 if better and self.best - loss >= self.min_delta else self.count + 1
        self.best = min(self.best, loss)
        return better

    @property
    def stop(self) -> bool:
        return self.count >= self.patience


class Read(NamedTuple):
    """A layer as good as it got on the pictures kept back."""

    layer: nn.Linear
    epochs: int  # that ran
    best: int  # counted from 1
    loss: float


def train_readout(
    x: Tensor, labels: Tensor, classes: int, settings: Readout, *, seed: int, stop: Callable[[], bool]
) -> Read | None:
    """Features (n, D) and labels (n,) -> the read-out; None where it was asked to stop.

    Every rank has all features and does the same; rank 0 says when it is enough.
    """
    generator = torch.Generator().manual_seed(distributed.fold(seed))
    order = torch.randperm(len(x), generator=generator).to(x.device)
    held = min(max(round(settings.holdout * len(x)), 1), len(x) - 1)
    val, train = order[:held], order[held:]
    torch.manual_seed(distributed.fold(seed, 1))
    layer = nn.Linear(x.shape[1], classes).to(x.device)
    optimizer = torch.optim.Adam(layer.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    early, best = EarlyStopping(settings.patience, settings.min_delta), Read(copy.deepcopy(layer), 0, 0, math.inf)
    for epoch in range(1, settings.epochs + 1):
        shuffled = train[torch.randperm(len(train), generator=generator).to(x.device)]
        for batch in torch.split(shuffled, settings.batch_size):
            torch.autograd.backward(F.cross_entropy(layer(x[batch]), labels[batch]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss, asked = distributed.from_first((measure(layer, x[val], labels[val])["loss"], stop()))
        if asked:
            return None
        if early.see(loss):
            best = Read(copy.deepcopy(layer), epoch, epoch, loss)
        best = best._replace(epochs=epoch)
        if early.stop:
            break
    return best


@torch.no_grad()
def measure(layer: nn.Linear, x: Tensor, labels: Tensor) -> Mapping[str, Any]:
    """The mean loss, and the share of pictures whose best guess is right."""
    logits = layer(x)
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "top1": (logits.argmax(1) == labels).double().mean().item(),
    }
