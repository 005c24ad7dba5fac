"""What it saves that MAE's encoder sees a quarter of the patches: forward and backward, both sides in one process.

    python benchmarks/mae_encoder.py [--encoder vit_base] [--batch 4] [--rounds N]

One side runs the encoder on the patches that ``mask_ratio=0.75`` keeps, as ``main_mae`` does, the other the same
encoder on all of them. The sides take turns; CPU time of one thread, or time on the clock where there is a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from contract.settings.main_mae import Settings
from workers import main_mae
from workers.engine import distributed
from workers.main_mae import MAE
from workers.masking.patches import take
from workers.masking.random import split


def step(model: MAE, images: Tensor, *, all_patches: bool) -> None:
    """Forward and backward of the encoder."""
    patches = model.encoder.patchify(images)
    visible, hidden = split(model.draw(images), model.kept)
    ids = torch.cat([visible, hidden], dim=1) if all_patches else visible
    model.encoder(take(patches, ids), ids).square().mean().backward()
    model.zero_grad(set_to_none=True)


def seconds(model: MAE, images: Tensor, *, all_patches: bool) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(model, images, all_patches=all_patches)
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    step(model, images, all_patches=all_patches)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_base")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = {"decoder_dim": 16, "decoder_heads": 1, "decoder_depth": 1}  # no part of what is timed
    settings = Settings(worker="main_mae", encoder=args.encoder, patch_size=16, input_size=224, lr=1e-3, **small)
    model = main_mae.build(settings).to(distributed.device())
    images = torch.randn(args.batch, 3, 224, 224, device=distributed.device())
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(2 + args.rounds):
        for every in (True, False) if i % 2 else (False, True):
            took = seconds(model, images, all_patches=every)
            if i > 1:  # the first two warm up
                times[every].append(took)
    for every, name in ((True, f"all {model.encoder.patches}"), (False, f"{model.kept} kept")):
        print(
            f"{args.encoder} {name:8} patches {1000 * statistics.median(times[every]) / args.batch:8.1f} ms a picture"
        )
    ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
    print(f"{args.encoder} kept / all: {ratio:.2f} x the speed")


if __name__ == "__main__":
    main()
