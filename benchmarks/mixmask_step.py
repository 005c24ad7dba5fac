"""The training step of MoCo, MixMask, Un-Mix and both against a plain version of the same, one thread, in one run.

    python benchmarks/mixmask_step.py [--arch resnet18] [--size 64] [--batch 32] [--queue 65536] [--rounds N]

A step is mixing, the passes, the losses, the keys' average and SGD. The plain side follows the equations as the papers
print them: pictures multiplied by masks and added, channels first, 1 + K logits and a cross-entropy for every term
(also for the terms that only turn the queries round), the average parameter by parameter, SGD as torch gives it. Both
start from the same weights and draws, and their losses are compared before anything is timed. CPU time, not wall time;
the sides take turns.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract.settings.main_moco_mixmask import Settings
from workers import main_moco_mixmask
from workers.main_moco_mixmask import MoCo
from workers.masking.mix import Draws, block_mask

METHODS = ("moco", "mixmask", "unmix", "both")


class Plain(nn.Module):
    """The equations one by one, on the parameters of a ``MoCo``."""

    def __init__(self, method: MoCo):
        super().__init__()
        self.method = method.to(memory_format=torch.contiguous_format)

    def before_step(self, momentum: float) -> None:
        m = self.method
        for online, target in ((m.encoder, m.target_encoder), (m.projector, m.target_projector)):
            for weight, average in zip(online.parameters(), target.parameters(), strict=True):
                average.data = average.data * momentum + weight.data * (1 - momentum)

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        m, draws = self.method, Draws()
        query, key = views[:, 0].contiguous(), views[:, 1].contiguous()
        mixtures = []
        if m.method in ("unmix", "both"):
            mixtures.append(self.unmix(query, draws))
        if m.method in ("mixmask", "both"):
            mixtures.append(self.mixmask(query, draws))
        queries = [self.embed(query)] + [self.embed(mixed) for mixed, _, _ in mixtures]
        with torch.no_grad():
            keys = F.normalize(m.target_projector(vector(m.target_encoder, key)), dim=1)
        loss = self.cross_entropy(queries[0], keys)
        for q, (_, inverse, share) in zip(queries[1:], mixtures, strict=True):
            loss = loss + share * self.cross_entropy(q, keys) + (1 - share) * self.cross_entropy(q[inverse], keys)
        at = int(m.place)
        m.queue[at : at + len(keys)] = keys
        m.place[0] = (at + len(keys)) % len(m.queue)
        return {"loss": loss}

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.method.projector(vector(self.method.encoder, images)), dim=1)

    def cross_entropy(self, queries: Tensor, keys: Tensor) -> Tensor:
        m = self.method
        negative = torch.einsum("nc,ck->nk", queries, m.queue.T.clone().detach())
        logits = torch.cat([torch.einsum("nc,nc->n", queries, keys)[:, None], negative], dim=1) / m.temperature
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))

    def mixmask(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor, float]:
        m, (b, _, side, _) = self.method, images.shape
        other = draws.permutation(b) if m.method == "both" else torch.arange(b).flip(0)
        grid = (~block_mask(draws, m.grid_size, int(m.grid_size**2 * (1 - m.mask_ratio)))).float()[None, None]
        mask = F.interpolate(grid, size=(side, side), mode="nearest").expand_as(images)
        share = mask[0, 0].mean().item()
        return images * mask + images[other] * (1 - mask), other.argsort(), share

    def unmix(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor, float]:
        mixed = self.method.unmix(images, draws)  # one blend or one box: there is nothing to gain
        return mixed.images, mixed.guest_in, mixed.share


def vector(encoder: nn.Module, images: Tensor) -> Tensor:
    x = encoder.maxpool(F.relu(encoder.bn1(encoder.conv1(images))))
    x = encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class Side:
    """One of the two, ready to step."""

    def __init__(self, name: str, method: MoCo, settings: Settings):
        self.model: MoCo | Plain = method if name == "ours" else Plain(method)
        parts = main_moco_mixmask.groups(method, settings)
        if name == "ours":
            self.optimizer = main_moco_mixmask.optimizer(parts, settings)
        else:
            self.optimizer = torch.optim.SGD(parts, lr=settings.peak_lr, momentum=0.9, weight_decay=1e-4)
        self.seconds: list[float] = []

    def step(self, views: Tensor, seed: int) -> float:
        torch.manual_seed(seed)
        start = time.process_time()
        self.model.before_step(0.999)
        loss = self.model(views)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - start)
        return loss.item()


def compare(method: str, args: argparse.Namespace) -> None:
    settings = Settings(
        worker="main_moco_mixmask", method=method, arch=args.arch, image_size=args.size, batch_size=args.batch,
        queue_size=args.queue, lr=0.01, grid_size=8,
    )  # fmt: skip
    settings.resolve_batch(1)
    torch.manual_seed(0)
    model, views = main_moco_mixmask.build(settings), torch.randn(args.batch, 2, 3, args.size, args.size)
    sides = [Side(name, copy.deepcopy(model), settings) for name in ("plain", "ours")]
    plain, ours = (side.step(views, 0) for side in sides)
    assert abs(plain - ours) < 1e-4 * abs(plain), f"not the same method: losses {plain} and {ours}"
    for i in range(args.rounds):
        for side in sides if i % 2 else sides[::-1]:
            side.step(views, i)
    ratio = statistics.median(a / b for a, b in zip(*(side.seconds[1:] for side in sides), strict=True))
    speeds = [args.batch / statistics.median(side.seconds[1:]) for side in sides]
    print(f"{method:8} plain {speeds[0]:6.1f}, ours {speeds[1]:6.1f} images per CPU-second: {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--method", choices=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for method in [args.method] if args.method else METHODS:
        compare(method, args)
