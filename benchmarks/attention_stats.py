"""Attention statistics against the plain forward of the same encoder on the same batch, one thread.

    python benchmarks/attention_stats.py [--encoder vit_small] [--batch 8] [--rounds N]

The plain side uses the fused attention kernel and makes no map; the statistics are all that main_attention_stats
counts. The last block's tokens of both are compared before anything is timed. CPU time, not wall time; the sides take
turns and the lowest time of each counts. Memory: the peak of one batch over what was there before it, in a process
per depth.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from workers import models
from workers.main_attention_stats import Tally
from workers.models import Encoder
from workers.models.vit import PRESETS

DEPTHS = (6, 12, 24)
GOAL = 1.25


def build(name: str, depth: int | None = None) -> Encoder:
    torch.manual_seed(0)
    shape = PRESETS[name] | ({"depth": depth} if depth else {})
    return models.build("vit", {**shape, "patch_size": 16, "grid_size": 14}).eval().requires_grad_(False)


def peak_of(work: Callable[[], object]) -> float:
    """Megabytes that ``work`` needs at most, over what is there before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = megabytes("VmRSS")
    work()
    return megabytes("VmHWM") - before


def megabytes(key: str) -> float:
    return float(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def timed(encoder: Encoder, images: Tensor, rounds: int) -> tuple[float, float]:
    """Seconds of CPU per batch: the plain forward, the statistics."""
    tally = Tally(encoder, images.device)
    torch.testing.assert_close(tally.look(encoder, images), encoder.tokens(images), rtol=1e-3, atol=1e-3)
    best = [float("inf"), float("inf")]
    for number in range(rounds):
        sides = [lambda: encoder.tokens(images), lambda: tally.look(encoder, images)]
        for side in (0, 1) if number % 2 else (1, 0):
            began = time.process_time()
            sides[side]()
            best[side] = min(best[side], time.process_time() - began)
    return best[0], best[1]


def memory(side: str, name: str, depth: int, batch: int) -> float:
    """``peak_of`` one batch in a process of its own."""
    command = [sys.executable, __file__, "--encoder", name, "--batch", str(batch), "--memory", side, str(depth)]
    return float(subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--encoder", default="vit_small", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "DEPTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        encoder = build(args.encoder, int(args.memory[1]))
        images = torch.randn(args.batch, 3, encoder.image_size, encoder.image_size)
        tally = Tally(encoder, images.device)
        work = {"plain": lambda: encoder.tokens(images), "statistics": lambda: tally.look(encoder, images)}
        print(peak_of(work[args.memory[0]]))
        return
    encoder = build(args.encoder)
    images = torch.randn(args.batch, 3, encoder.image_size, encoder.image_size)
    plain, stats = timed(encoder, images, args.rounds)
    print(f"{args.encoder}/16, batch {args.batch}, one thread, torch {torch.__version__}")
    print(f"plain forward  {plain:7.3f} s of CPU a batch  {args.batch / plain:6.2f} pictures per CPU-second")
    print(f"statistics     {stats:7.3f} s of CPU a batch  {args.batch / stats:6.2f} pictures per CPU-second")
    print(f"ratio {stats / plain:.3f} (goal: at most {GOAL})")
    for side in ("plain", "statistics"):
        found = [memory(side, args.encoder, depth, args.batch) for depth in DEPTHS]
        shown = "  ".join(f"{depth} blocks {each:5.0f} MB" for depth, each in zip(DEPTHS, found, strict=True))
        print(f"memory for one batch, {side:10}: {shown}")


if __name__ == "__main__":
    main()
