"""BatchNorm whose batch is that of all processes, and BatchNorm's estimates made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import distributed

LOOK_EVERY = 10  # batches between two questions whether to stop


class _Synced(_BatchNorm):
    """Statistics over the micro-batches of all ranks, whose sizes may differ: (B, D, ...) -> (B, D, ...).

    torch's own synchronised one knows GPUs only. Mean and variance take a round each, since their difference of big
    numbers in a single round would cost digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        others = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        n = distributed.total(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = distributed.total_with_gradient(x.sum(others)) / n
        centred = x - mean.view(shape)
        variance = distributed.total_with_gradient(centred.square().sum(others)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = (variance + self.eps).rsqrt()
        if not self.affine:
            return centred * scale.view(shape)
        return centred * (scale * self.weight).view(shape) + self.bias.view(shape)


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    """(B, D) -> (B, D)"""


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    """(B, D, H, W) -> (B, D, H, W)"""


def synced(network: nn.Module) -> nn.Module:
    """The network with every BatchNorm2d over all ranks: torch's own on GPUs, ours elsewhere. Names of tensors stay."""
    if distributed.world_size() == 1:
        return network
    if distributed.device().type == "cuda":
        found: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return found
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                new = SyncedBatchNorm2d(child.num_features, child.eps, child.momentum or 0.1).to(child.weight)
                new.load_state_dict(child.state_dict())
                setattr(parent, name, new)
    return network


@torch.no_grad()
def precise(
    network: nn.Module, batches: Iterable[Any], see: Callable[[int, Any], object], stop: Callable[[], bool]
) -> bool:
    """Give every BatchNorm the statistics of these batches in place of a running average: mean and variance of all that
    it sees while ``see(number, batch)`` runs, weighed alike (Wu and Johnson, 2021, section 3).

    Over all ranks, which have as many batches each. False, and the network is of no use, where one was asked to stop.
    """
    layers = [each for each in network.modules() if isinstance(each, _BatchNorm) and each.training]
    momenta = [each.momentum for each in layers]
    mean = [torch.zeros_like(_estimates(each)[0], dtype=torch.float64) for each in layers]
    square = [torch.zeros_like(each) for each in mean]
    seen = 0
    for each in layers:
        each.momentum = 1.0  # the estimates are those of the last batch
    for number, batch in enumerate(batches):
        see(number, batch)
        seen += 1
        if seen % LOOK_EVERY == 0 and any(asked for (asked,) in distributed.exchange([stop()])):
            return False
        for place, each in enumerate(layers):
            m, v = (x.double() for x in _estimates(each))
            mean[place] += m
            square[place] += v + m.square()
    for each, momentum, m, s in zip(layers, momenta, mean, square, strict=True):
        each.momentum = momentum
        m, s = (distributed.mean(x / max(seen, 1)) for x in (m, s))
        for estimate, value in zip(_estimates(each), (m, s - m.square()), strict=True):
            estimate.copy_(value)
    return True


def _estimates(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var
