"""Eight heads in one pass over a frozen encoder, against one head: the time of a training epoch.

Both sides train on the same pictures through the same ViT-S/16 at 224 pixels, in turns. One thread, CPU time; on a GPU,
where there is one, wall time. ``python benchmarks/probe_heads.py vit_tiny`` takes another encoder.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from contract.settings.main_linprobe import Settings
from workers import models
from workers.engine import distributed
from workers.engine.frozen import Frozen, Reading, block_of
from workers.main_linprobe import Probe, build_head, build_optimizer
from workers.models.vit import PRESETS

EIGHT = [f"{kind}:{rate}:lars" for kind in ("cls", "gap", "both", "abmilp") for rate in (0.05, 0.1)]
ROUNDS, CLASSES = 5, 1000
BATCH, STEPS = (256, 5) if torch.cuda.is_available() else (16, 2)


def main(encoder_name: str = "vit_small") -> None:
    torch.set_num_threads(1)
    device = distributed.device()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    encoder = models.build("vit", {**PRESETS[encoder_name], "patch_size": 16, "grid_size": 14}).to(device)
    encoder.requires_grad_(False)
    images = torch.randn(BATCH, 3, encoder.image_size, encoder.image_size, device=device)
    labels = torch.randint(0, CLASSES, (BATCH,), device=device)

    def epoch(heads: list[str]) -> float:
        settings = Settings(worker="main_linprobe", encoder="-", optimizer="lars", heads=heads, batch_size=BATCH)
        settings.resolve_batch(1)
        readings = [Reading(head.features, block_of(encoder, head.block)) for head in settings.all_heads]
        frozen = Frozen(encoder, readings)
        built = [build_head(frozen.shapes[reading], CLASSES, settings) for reading in readings]
        model = Probe(built, readings, frozen, heads).to(device).train()
        optimizer = build_optimizer(model, settings.all_heads, settings, settings.peak_lr)
        begun = clock()
        for _ in range(STEPS):
            model((images, labels))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - begun

    one, eight = [], []
    for turn in range(ROUNDS + 1):
        for side, heads in ((one, EIGHT[2:3]), (eight, EIGHT))[:: 1 if turn % 2 else -1]:
            side.append(epoch(heads))
    ratios = [b / a for a, b in list(zip(one, eight, strict=True))[1:]]
    print(
        f"{encoder_name}/16 at 224 on {device.type}: {1000 * statistics.median(one) / STEPS:.0f} ms a step, one head; "
        f"eight heads / one: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} in {ROUNDS} pairs)"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
