"""The covariance term from the B x B matrix against the D x D one that it is defined by, both sides in one process.

    python benchmarks/sparsity.py [--batch 512] [--features 18432] [--rounds N]

Both give the same number. The sides take turns; CPU time of one thread, or time on the clock where there is a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from workers.engine import distributed
from workers.losses.sparsity import STD_EPS, covariance


def by_definition(x: Tensor) -> Tensor:
    """The matrix of all pairs of units, its diagonal set to 0, squared and summed."""
    z = (x - x.mean(0)) / (x.std(0) + STD_EPS)
    matrix = z.T @ z / (len(x) - 1)
    return matrix.fill_diagonal_(0).pow_(2).sum() / x.shape[1]


def seconds(side: Callable[[Tensor], Tensor], x: Tensor) -> float:
    clock = time.perf_counter if x.is_cuda else time.process_time
    if x.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    side(x).item()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--features", type=int, default=18432)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.rand(args.batch, args.features, device=distributed.device()).relu_()
    sides = {"by definition": by_definition, "batch x batch": covariance}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(1 + args.rounds):
        for name in sorted(sides, reverse=bool(i % 2)):
            took = seconds(sides[name], x)
            if i:  # the first warms up
                times[name].append(took)
    values = {name: float(side(x)) for name, side in sides.items()}
    for name, each in times.items():
        print(f"{name} {1000 * statistics.median(each):9.1f} ms, value {values[name]:.6g}")
    ratio = statistics.median(a / b for a, b in zip(times["by definition"], times["batch x batch"], strict=True))
    print(f"covariance, batch x batch: {ratio:.1f} x the speed")


if __name__ == "__main__":
    main()
