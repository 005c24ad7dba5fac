"""An epoch of the probe from kept features, against an epoch through the encoder: both train the same heads.

ViT-Ti/16 at 224 pixels, the hardest of the usual ones: a bigger encoder only adds to what is saved.
One thread, CPU time; on a GPU, where there is one, wall time. Reading and decoding pictures is not counted.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from contract.settings.main_linprobe import Settings
from workers import models
from workers.data.loader import Cached, train_loader
from workers.engine import distributed
from workers.engine.frozen import Frozen, Reading, block_of
from workers.main_linprobe import Probe, build_head, build_optimizer
from workers.models.vit import PRESETS

ROUNDS, CLASSES = 3, 100
BATCH, PICTURES = (256, 4096) if torch.cuda.is_available() else (16, 64)


def main(encoder_name: str = "vit_tiny") -> None:
    torch.set_num_threads(1)
    device = distributed.device()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    encoder = models.build("vit", {**PRESETS[encoder_name], "patch_size": 16, "grid_size": 14}).to(device)
    encoder.requires_grad_(False)
    images = torch.randn(PICTURES, 3, encoder.image_size, encoder.image_size, device=device)
    labels = torch.arange(PICTURES, device=device) % CLASSES
    names = [str(c) for c in range(CLASSES)]

    for features in ("gap", "abmilp"):
        settings = Settings(worker="main_linprobe", encoder="-", optimizer="lars", batch_size=BATCH)
        settings.resolve_batch(1)
        reading = Reading(features, block_of(encoder, None))
        frozen = Frozen(encoder, [reading])
        kept = torch.cat([frozen.packed(each) for each in images.split(BATCH)])

        def epoch(x: Tensor, read: object, reading: Reading = reading, settings: Settings = settings) -> float:
            head = build_head(Frozen(encoder, [reading]).shapes[reading], CLASSES, settings)
            model = Probe([head], [reading], read).to(device).train()
            optimizer = build_optimizer(model, settings.all_heads, settings, settings.peak_lr)
            data = Cached(x.flatten(1), labels, names)
            loader = train_loader(data, lambda x: x, BATCH, seed=0, rank=0, world=1, fold=distributed.fold)
            begun = clock()
            for batch in loader:
                model((batch[0].view(-1, *x.shape[1:]), batch[1]))["loss"].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return clock() - begun

        pairs = [(epoch(images, frozen), epoch(kept, frozen.unpack)) for _ in range(ROUNDS + 1)][1:]
        live, cached = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(
            f"{encoder_name}/16 at 224 on {device.type}, features={features}: {PICTURES} pictures through the encoder "
            f"{live:.2f} s, from the cache {1000 * cached:.1f} ms: {live / cached:.0f} times faster "
            f"({4e-6 * frozen.width:.3g} MB a picture)"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
