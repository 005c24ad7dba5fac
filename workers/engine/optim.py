"""Optimizers, parameter groups and schedules."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def cosine(t: float, start: float, end: float) -> float:
    """Half a cosine wave from ``start`` at t=0 to ``end`` at t=1."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def warmup_cosine(t: float, *, peak: float, warmup: float, floor: float = 0.0, start: float = 0.0) -> float:
    """Linear from ``start`` to ``peak`` over the first ``warmup`` (a fraction), then a cosine to ``floor``."""
    if t < warmup:
        return start + (peak - start) * t / warmup
    return cosine((t - warmup) / (1 - warmup), peak, floor) if warmup < 1 else peak


def adamw(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, ICLR 2019), all parameters in one fused kernel where torch has one."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def sgd(groups: list[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum, all parameters in one fused kernel."""
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)


def falling(
    t: float,
    *,
    epochs: int,
    peak: float,
    warmup_epochs: float = 0.0,
    milestones: Sequence[int] | None = None,
    whole_epochs: bool = False,
) -> float:
    """After a linear warm-up a tenth from each epoch of ``milestones`` on, or, where these are None, a cosine to 0.

    ``whole_epochs`` keeps the rate through an epoch at what it is at its beginning, as MoCo's programs do.
    """
    whole, warmup = max(epochs, 1), warmup_epochs / max(epochs, 1)
    epoch = t * whole + 1e-9  # a step's fraction is rounded
    if whole_epochs:
        t = math.floor(epoch) / whole
    if milestones is None or t < warmup:
        return warmup_cosine(t, peak=peak, warmup=warmup)
    return peak * 0.1 ** bisect.bisect_right(milestones, epoch)


def stepped(iteration: int, *, peak: float, warmup: int, start: float, milestones: Sequence[int]) -> float:
    """Detectron2's schedule: a tenth from each of ``milestones`` on, times what rises linearly from ``start`` to 1 over
    the first ``warmup`` iterations. Counted from 0."""
    rise = 1.0 if iteration >= warmup else start + (1 - start) * iteration / warmup
    return peak * 0.1 ** bisect.bisect_right(milestones, iteration) * rise


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., 2017, eq. 6), as MAE's linear probe uses it.

    The step of a weight matrix is scaled by ``trust * |w| / |g + weight_decay * w|``; parameters of one dimension
    (biases, norms) take plain momentum steps without decay. A group with ``trust=None`` is plain SGD with momentum, so
    that both kinds can share an optimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float | None = 0.001,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1 or group["trust"] is None:
                    update = update.add(p, alpha=group["weight_decay"])
                if p.ndim > 1 and group["trust"] is not None:
                    update = update * _trust_ratio(p, update, group["trust"])
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                p.add_(state["momentum"], alpha=-group["lr"])


def _trust_ratio(p: Tensor, update: Tensor, trust: float) -> Tensor:
    weight, step = p.norm(), update.norm()
    return torch.where((weight > 0) & (step > 0), trust * weight / step, torch.ones_like(weight))
