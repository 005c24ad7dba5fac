"""Optimizers, parameter groups and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., 2017, eq. 6), as MAE's linear probe uses it.

    The step of a weight matrix is scaled by ``trust * |w| / |g + weight_decay * w|``; parameters of one dimension
    (biases, norms) take plain momentum steps without decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
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
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    update = update * _trust_ratio(p, update, group["trust"])
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(update)
                p.add_(state["momentum"], alpha=-group["lr"])


def _trust_ratio(p: Tensor, update: Tensor, trust: float) -> Tensor:
    weight, step = p.norm(), update.norm()
    return torch.where((weight > 0) & (step > 0), trust * weight / step, torch.ones_like(weight))
