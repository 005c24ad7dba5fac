"""A training step of MIM across eye movements against a plain one, both sides in one process.

    python benchmarks/eyemim_step.py [--batch 64] [--rounds N]

One side is the network, loss, statistics and fused Adam of ``main_eyemim``, channels last. The other is written as the
method is described: torch's default memory format, transposed 1 x 1 convolutions, an Adam that loops over the
parameters; once without the statistics and once with the covariance of all pairs of units, which the published program
logs at every step. The sides take turns; CPU time of one thread, or time on the clock where there is a GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contract.settings.main_eyemim import Settings
from workers import main_eyemim
from workers.engine import distributed
from workers.losses.sparsity import STD_EPS
from workers.main_eyemim import EyeMIM, Glimpse


class Plain(nn.Module):
    """The same weights without the rest."""

    def __init__(self, model: EyeMIM):
        super().__init__()
        self.encoder, self.decoder = (copy.deepcopy(part.blocks) for part in (model.encoder, model.decoder))
        for block in self.encoder:
            if isinstance(block.skip, nn.Conv2d):
                block.skip.stride = (block.stride, block.stride)
        self.to(memory_format=torch.contiguous_format)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        x = seen
        for block in self.encoder:
            x = F.relu(block.conv2(F.relu(block.conv1(x))) + block.skip(x))
        latent = x
        for block in self.decoder:
            y = block.conv2(F.relu(block.conv1(x)))
            y = y + (x if block.skip is None else block.skip(x))
            x = y.sigmoid() if block.last else F.relu(y)
        return x, latent


def plain_step(model: Plain, optimizer: torch.optim.Optimizer, glimpse: Glimpse, *, covariance: bool) -> float:
    predicted, latent = model(glimpse.seen)
    weight = glimpse.weight.expand_as(predicted)
    loss = ((predicted - glimpse.target).square() * weight).sum() / weight.sum()
    if covariance:
        x = latent.flatten(1)
        z = (x - x.mean(0)) / (x.std(0) + STD_EPS)
        matrix = z.T @ z / (len(x) - 1)
        (matrix.square().sum() - matrix.diagonal().square().sum()).div(x.shape[1]).item()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def our_step(model: EyeMIM, optimizer: torch.optim.Optimizer, glimpse: Glimpse) -> float:
    loss = model(glimpse)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = Settings(worker="main_eyemim", image_size=96, channels=32, patch_size=8, lr=5e-4)
    model = main_eyemim.build(settings).to(distributed.device())
    eye = main_eyemim.movement(settings)
    raw = torch.randint(256, (args.batch, 3, 96, 96), dtype=torch.uint8)
    u = torch.rand(args.batch, 1, eye.numbers, dtype=torch.float64)
    glimpse = main_eyemim.finish(settings, eye)(((raw, u), u, u))

    plain = Plain(model).to(distributed.device())
    rate = {"lr": settings.peak_lr, "weight_decay": settings.weight_decay}
    slow = torch.optim.Adam(plain.parameters(), foreach=False, **rate)
    fast = torch.optim.Adam(model.parameters(), fused=True, **rate)
    sides: dict[str, Callable[[], float]] = {
        "plain": lambda: plain_step(plain, slow, glimpse, covariance=False),
        "plain, all pairs": lambda: plain_step(plain, slow, glimpse, covariance=True),
        "ours, statistics too": lambda: our_step(model, fast, glimpse),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    cuda = distributed.device().type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    for i in range(1 + args.rounds):
        for name in sorted(sides, reverse=bool(i % 2)):
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            losses[name].append(sides[name]())
            if cuda:
                torch.cuda.synchronize()
            if i:  # the first warms up
                times[name].append(clock() - start)
    first = losses["plain"][0], losses["ours, statistics too"][0]
    assert abs(first[0] - first[1]) < 1e-5, first
    ours = statistics.median(times["ours, statistics too"])
    for name, each in times.items():
        took = statistics.median(each)
        print(f"{name:21} {1000 * took / args.batch:7.2f} ms a picture, {took / ours:.2f} x the time of ours")


if __name__ == "__main__":
    main()
