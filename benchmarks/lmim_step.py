"""The training step of Latent MIM against a plain version of the same equations, one thread, both sides in one run.

    python benchmarks/lmim_step.py [--size demo|small] [--rounds N]

A step is forward, backward, moving average and optimizer. The plain side multiplies, softmaxes and multiplies for
attention, makes the N x N table of similarities, normalises before it multiplies, averages the target parameter by
parameter and uses AdamW as torch gives it. Both start from the same weights and draws, and their losses are compared
before anything is timed. CPU time, not wall time; the sides take turns; memory is the peak of a process per side.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract.settings.main_lmim import Projector, Settings
from workers import main_lmim
from workers.engine import optim
from workers.main_lmim import Draws, LatentMIM
from workers.models.cross_decoder import CrossAttention
from workers.models.vit import Attention, Mlp

PUBLISHED = {
    "encoder": "vit_small",
    "patch_size": 16,
    "grid_size": 14,
    "patch_gap": 4,
    "num_vis": 20,
    "decoder_dim": 512,
    "decoder_depth": 3,
    "decoder_heads": 16,
    "proj": Projector(mlp_dim=4096, mlp_depth=3),
    "avg_sim_coeff": 0.1,
}
SIZES: dict[str, tuple[Settings, int, int]] = {  # settings, pictures a step, steps a turn
    "demo": (Settings(worker="main_lmim"), 64, 5),
    "small": (Settings(worker="main_lmim", **PUBLISHED), 4, 1),
}


class Plain(nn.Module):
    """The equations one by one, on the parameters of a ``LatentMIM``."""

    def __init__(self, method: LatentMIM):
        super().__init__()
        self.method = method

    def before_step(self, momentum: float, sim_target: float) -> None:
        self.method.sim_target = sim_target
        for online, target in (("encoder", "target_encoder"), ("projector", "target_projector")):
            averages, weights = (getattr(self.method, name).parameters() for name in (target, online))
            for average, weight in zip(averages, weights, strict=True):
                average.data = average.data * momentum + weight.data * (1 - momentum)

    def forward(self, images: Tensor, draws: Draws | None = None) -> dict[str, Tensor]:
        m = self.method
        draws = draws or m.draw(images)
        patches, order = windows(images, m, draws), draws.noise.argsort(1)
        visible, hidden = order[:, : m.num_vis], order[:, m.num_vis :]
        with torch.no_grad():
            target = head(m.target_projector, encode(m.target_encoder, gather(patches, hidden), hidden))[:, 1:]
        latents = head(m.projector, encode(m.encoder, gather(patches, visible), visible))
        prediction = decode(m.decoder, latents, visible, hidden)
        y = (prediction - prediction.mean(1, keepdim=True)) / (prediction.std(1, keepdim=True) + 1e-4)
        logits = F.normalize(y, dim=-1) @ F.normalize(target, dim=-1).transpose(1, 2) / m.tau
        own = torch.arange(logits.shape[1]).expand(len(logits), -1)
        loss = 2 * m.tau * F.cross_entropy(logits.flatten(0, 1), own.flatten())
        sims = [similarity(x) for x in (prediction, latents[:, 1:], target)]
        loss = loss + m.avg_sim_coeff * sum((sim - m.sim_target) ** 2 for sim in sims[:2])
        return {"loss": loss, "avg_sim_pred": sims[0], "avg_sim_vis": sims[1], "avg_sim_trg": sims[2]}


def windows(images: Tensor, m: LatentMIM, draws: Draws) -> Tensor:
    p, cell = m.encoder.patch_size, m.encoder.patch_size + m.patch_gap
    b, (rows, columns) = len(images), m.encoder.grid
    cells = images.view(b, 3, rows, cell, columns, cell).permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, y, x, channel)
    if draws.jitter is not None:
        for axis, offset in zip((3, 4), draws.jitter, strict=True):
            lines = (offset[..., None] + torch.arange(p)).view(b, rows, columns, *((p, 1) if axis == 3 else (1, p)), 1)
            shape = [p if i == axis else n for i, n in enumerate(cells.shape)]
            cells = cells.gather(axis, lines.expand(shape))
    return cells.reshape(b, rows * columns, -1)


def gather(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def encode(vit: nn.Module, patches: Tensor, ids: Tensor) -> Tensor:
    weight = vit.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    x = patches @ weight.T + vit.patch_embed.proj.bias
    x = x + gather(vit.pos_embed[:, 1:].expand(len(x), -1, -1), ids)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1)
    for block in vit.blocks:
        x = x + self_attend(block.attn, block.norm1(x))
        x = x + mlp(block.mlp, block.norm2(x))
    return vit.norm(x)


def head(projector: nn.Module, x: Tensor) -> Tensor:
    return projector(x)


def decode(d: nn.Module, latents: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    x, table = d.embed(latents), d.pos_embed[:, 1:].expand(len(latents), -1, -1)
    here, there = gather(table, hidden), gather(table, visible)
    q = d.mask_token.expand(len(x), hidden.shape[1], -1)
    if d.with_cues:
        q = q + (here @ there.transpose(1, 2) / here.shape[-1] ** 0.5).softmax(-1) @ x[:, 1:]
    q = torch.cat([d.cls_token.expand(len(x), -1, -1), q + here], dim=1)
    x = torch.cat([x[:, :1], x[:, 1:] + there], dim=1)
    for block in d.blocks:
        q = q + self_attend(block.self_attn, block.norm1(q))
        q = q + cross_attend(block.cross_attn, block.norm2q(q), block.norm2kv(x))
        q = q + mlp(block.mlp, block.norm3(q))
    return d.head(d.norm(q))[:, 1:]


def self_attend(a: Attention, x: Tensor) -> Tensor:
    b, n, d = x.shape
    q, k, v = a.qkv(x).view(b, n, 3, a.heads, d // a.heads).permute(2, 0, 3, 1, 4)
    return a.proj(attend(q, k, v))


def cross_attend(a: CrossAttention, x: Tensor, context: Tensor) -> Tensor:
    b, n, d = x.shape
    q = a.q_proj(x).view(b, n, a.heads, d // a.heads).transpose(1, 2)
    k, v = a.kv_proj(context).view(b, -1, 2, a.heads, d // a.heads).permute(2, 0, 3, 1, 4)
    return a.proj(attend(q, k, v))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def mlp(m: Mlp, x: Tensor) -> Tensor:
    return m.fc2(F.gelu(m.fc1(x)))


def similarity(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=-1)
    return (x @ x.transpose(1, 2)).mean()


class Side:
    """One of the two, ready to step."""

    def __init__(self, name: str, method: LatentMIM, settings: Settings):
        self.model: LatentMIM | Plain = method if name == "ours" else Plain(method)
        groups = main_lmim.groups(method, settings)
        make = optim.adamw if name == "ours" else torch.optim.AdamW
        self.optimizer = make(groups, lr=1e-4, betas=(0.9, 0.95))
        self.seconds: list[float] = []

    def steps(self, images: Tensor, count: int) -> None:
        start = time.process_time()
        for _ in range(count):
            self.model.before_step(0.99, 0.5)
            self.model(images)["loss"].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.seconds.append((time.process_time() - start) / count)


def set_up(size: str, names: list[str]) -> tuple[list[Side], Tensor, int]:
    settings, batch, turn = SIZES[size]
    torch.manual_seed(0)
    method = main_lmim.build(settings)
    side = settings.grid_size * (settings.patch_size + settings.patch_gap)
    return [Side(n, copy.deepcopy(method), settings) for n in names], torch.randn(batch, 3, side, side), turn


def compare(size: str, rounds: int) -> None:
    sides, images, turn = set_up(size, ["plain", "ours"])
    draws = main_lmim.build(SIZES[size][0]).draw(images)
    plain, ours = (side.model(images, draws)["loss"].item() for side in sides)
    assert abs(plain - ours) < 1e-4 * abs(plain), f"not the same method: losses {plain} and {ours}"
    for i in range(2 + rounds):
        for side in sides if i % 2 else sides[::-1]:
            side.steps(images, turn if i > 1 else 1)  # the first two warm up
    seconds = [statistics.median(side.seconds[2:]) for side in sides]
    ratio = statistics.median(a / b for a, b in zip(*(side.seconds[2:] for side in sides), strict=True))
    memory = [peak(size, name) for name in ("plain", "ours")]
    for name, s, m in zip(("plain", "ours"), seconds, memory, strict=True):
        print(f"{size:6} {name:6} {len(images) / s:8.1f} images per CPU-second  {m:8.0f} MiB for the step")
    print(f"{size:6} ours / plain: {ratio:.2f} x the speed, {memory[1] / memory[0]:.2f} x the memory")


def resident(what: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM). getrusage is no use: it starts from the parent's peak."""
    found = re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def peak(size: str, name: str) -> float:
    """MiB that three steps need beyond what the weights and the libraries hold, in a process of their own."""
    command = [sys.executable, __file__, "--size", size, "--only", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: both")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", choices=("plain", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        (side,), images, _ = set_up(args.size, [args.only])
        before = resident("VmRSS")
        side.steps(images, 3)
        print(resident("VmHWM") - before)
    else:
        for size in [args.size] if args.size else SIZES:
            compare(size, args.rounds)
