"""BatchNorm whose batch is that of all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import distributed


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` without affine, over the micro-batches of all ranks: (B, D) -> (B, D).

    torch's own synchronised one knows GPUs only. Mean and variance take a round each, since their difference of big
    numbers in a single round would cost digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        n = distributed.total(torch.tensor(float(len(x)), device=x.device))
        mean = distributed.total_with_gradient(x.sum(0)) / n
        centred = x - mean
        variance = distributed.total_with_gradient(centred.square().sum(0)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return centred * (variance + self.eps).rsqrt()
