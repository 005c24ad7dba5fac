"""Linear probes on a frozen encoder (He et al., CVPR 2022, appendix A.1): a pooling of its tokens, BatchNorm without
affine, a linear layer. Any number of them, ``heads``, share the passes through the encoder and nothing else.

``linprobe/top1``, ``top5`` and ``loss`` are measured on the validation split after the last epoch, every picture once;
``linprobe/best_top1`` is the best of all evaluations. With ``heads`` these are the best head's, and
``linprobe/top1_HEAD`` is each one's own; ``tables/heads.csv`` has the rest, ``heads.pt`` the weights.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.features import Head
from contract.settings.main_linprobe import Settings
from workers.data import Pictures
from workers.data.few import few, same_classes
from workers.data.loader import Cached, Transform
from workers.engine import distributed, pictures, probe
from workers.engine.batchnorm import SyncedBatchNorm1d
from workers.engine.checkpoint import Checkpoint, CheckpointError
from workers.engine.encoder import load_encoder
from workers.engine.fit import DTYPES, fit
from workers.engine.frozen import Frozen, Reading, block_of, renormalised
from workers.engine.optim import LARS, warmup_cosine
from workers.engine.run import Run, loop, open_run, steps
from workers.models import Encoder
from workers.models.vit import sincos
from workers.pooling.abmilp import AbMILP
from workers.transforms.crops import OneShotCrop, RandomResizedCrop, ResizeCenterCrop

log = logging.getLogger(__name__)

HEADS = "heads.pt"
TABLE = "heads.csv"
COLUMNS = ("top1", "top5", "loss")


class Probe(nn.Module):
    """Heads on what ``read`` makes of a batch: readings (B, D), or tokens (B, 1 + N, D) for a head that pools them.

    ``read`` is no module, so the encoder in it is neither trained nor saved nor switched to training mode.
    """

    def __init__(
        self,
        heads: Sequence[nn.Sequential],
        readings: Sequence[Reading],
        read: Callable[[Tensor], dict[Reading, Tensor]],
        names: Sequence[str] = (),
    ):
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.readings, self.read = list(readings), read
        self.names = list(names) or [""] * len(self.heads)

    def logits(self, x: Tensor) -> list[Tensor]:
        """A batch of pictures, or of what was kept of them -> (B, classes) of every head."""
        found = self.read(x)
        return [head(found[reading]) for head, reading in zip(self.heads, self.readings, strict=True)]

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The sum of the losses: a head's gradient is its own. One that diverged counts no more, until all have."""
        x, labels = batch
        logits = self.logits(x)
        losses = torch.stack([F.cross_entropy(each, labels) for each in logits])
        top1 = [(each.argmax(1) == labels).float().mean() for each in logits]
        if len(logits) == 1:
            return {"loss": losses[0], "top1": top1[0]}
        finite = losses.isfinite()
        loss = torch.where(finite, losses, 0.0).sum().where(finite.any(), torch.nan)
        found = {"loss": loss}
        for name, own, right in zip(self.names, losses, top1, strict=True):
            found |= {f"loss_{name}": own, f"top1_{name}": right}
        return found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        for key, value in self.state_dict().items():
            if key in state_dict and state_dict[key].shape != value.shape:
                raise CheckpointError(
                    f"the checkpoint's {key} is {tuple(state_dict[key].shape)}, this run's {tuple(value.shape)}: "
                    f"made for other classes or features; delete the checkpoint to start again"
                )
        return super().load_state_dict(state_dict, strict, assign)


def build_head(shape: tuple[int, ...], classes: int, settings: Settings, has_cls: bool = True) -> nn.Sequential:
    """[AbMILP,] BatchNorm, linear; for readings of ``shape``: (D,), or (1 + N, D)."""
    layers: list[nn.Module] = []
    if len(shape) == 2:
        said = settings.abmilp
        if said.content == "all" and not has_cls:
            raise SettingsError("abmilp.content=all: this encoder has no class token; choose abmilp.content=patch")
        side = round((shape[0] - 1) ** 0.5)
        if said.cond == "pe" and side**2 != shape[0] - 1:
            raise SettingsError(f"abmilp.cond=pe: {shape[0] - 1} patches are no square grid; choose abmilp.cond=none")
        positions = sincos(side, side, shape[1], "mae") if said.cond == "pe" else None
        layers.append(
            AbMILP(shape[1], act=said.act, depth=said.depth, sa=said.sa, content=said.content, positions=positions)
        )
    norm = SyncedBatchNorm1d if settings.sync_bn else nn.BatchNorm1d
    linear = nn.Linear(shape[-1], classes)
    if settings.head_init == "mae":
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers, norm(shape[-1], affine=False, eps=1e-6), linear)


def build_optimizer(model: Probe, heads: Sequence[Head], settings: Settings, peak: float) -> torch.optim.Optimizer:
    """A group a head; ``lr_scale`` is its peak rate over ``peak``."""
    kinds = [head.optimizer or settings.optimizer for head in heads]
    groups: list[dict[str, Any]] = [
        {"params": list(each.parameters()), "lr_scale": settings.peak_of(head) / peak if peak else 0.0}
        for each, head in zip(model.heads, heads, strict=True)
    ]
    shared: dict[str, Any] = {"lr": peak, "weight_decay": settings.weight_decay, "momentum": settings.momentum}
    if set(kinds) == {"sgd"}:
        return torch.optim.SGD(groups, **shared)
    for group, kind in zip(groups, kinds, strict=True):
        if kind == "sgd":
            group["trust"] = None
    return LARS(groups, **shared)


class Best:
    """Every head's best top-1 so far, and its weights then. Part of the checkpoint."""

    def __init__(self, model: Probe):
        self.model = model
        self.top1 = [-1.0] * len(model.heads)
        self.weights: list[dict[str, Tensor]] = [{} for _ in model.heads]

    def see(self, top1: Sequence[float]) -> None:
        for i, value in enumerate(top1):
            if value > self.top1[i]:
                self.top1[i] = value
                self.weights[i] = _copy(self.model.heads[i])

    def state_dict(self) -> dict[str, Any]:
        return {"top1": list(self.top1), "weights": list(self.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.top1, self.weights = list(state_dict["top1"]), list(state_dict["weights"])


def _copy(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in head.state_dict().items()}


@torch.no_grad()
def evaluate(model: Probe, loader: DataLoader[Any], prepare: Any, amp: str = "none") -> Tensor:
    """Top-1, top-5 and loss of each head over all ranks, every picture counted once: (heads, 3)."""
    model.eval()
    distributed.agree(model.buffers())  # a rank's own running estimates are a step ahead of those that are saved
    device = distributed.device()
    sums = torch.zeros(len(model.heads), 4, dtype=torch.float64, device=device)
    for batch in loader:
        x, labels = prepare(batch)
        with torch.autocast(device.type, DTYPES[amp], enabled=amp != "none"):
            found = model.logits(x)
        for i, logits in enumerate(found):
            hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            sums[i] += torch.stack([hit[:, 0].sum(), hit.sum(), loss, loss.new_tensor(len(hit))]).to(sums)
    sums = distributed.total(sums)
    return (sums[:, :3] / sums[:, 3:]).cpu()


def named(found: Tensor, best: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    """Metrics out of (heads, 3) and every head's best top-1: of the best head, and of each under the names, if any."""
    leader = int(found[:, 0].argmax())
    metrics = {f"linprobe/{column}": float(found[leader, c]) for c, column in enumerate(COLUMNS)}
    metrics["linprobe/best_top1"] = max(best)
    return metrics | {f"linprobe/top1_{name}": float(found[i, 0]) for i, name in enumerate(names)}


def save_heads(run: Run[Settings], heads: Sequence[Head], classes: list[str], found: Tensor, best: Best) -> None:
    """``tables/heads.csv`` and ``heads.pt``: the last and the best of every head."""
    if distributed.rank():
        return
    settings, text = run.settings, io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["head", "features", "block", "optimizer", "lr", *COLUMNS, "best_top1"])
    for head, row, top1 in zip(heads, found.tolist(), best.top1, strict=True):
        block = "last" if head.block is None else head.block
        optimizer = head.optimizer or settings.optimizer
        table.writerow([head.name, head.features, block, optimizer, settings.peak_of(head), *row, top1])
        if len(heads) > 1:
            log.info("%-24s top1 %.4f  best %.4f", head.name, row[0], top1)
    (run.folder / rundir.TABLES).mkdir(exist_ok=True)
    rundir.write_atomic(run.folder / rundir.TABLES / TABLE, text.getvalue().encode())
    saved = {
        head.name: {"last": _copy(model), "best": weights}
        for head, model, weights in zip(heads, best.model.heads, best.weights, strict=True)
    }
    buffer = io.BytesIO()
    torch.save({"classes": classes, "heads": saved, "from": run.identity}, buffer)
    rundir.write_atomic(run.folder / HEADS, buffer.getvalue())


def freeze(settings: Settings, heads: Sequence[Head]) -> tuple[Encoder, Frozen, list[Reading]]:
    """The encoder, what reads it, and the reading of every head."""
    encoder = load_encoder(settings.encoder, image_size=settings.image_size)
    oracle = load_encoder(settings.oracle, image_size=settings.image_size) if settings.oracle else None
    readings = [Reading(head.features, block_of(encoder, head.block)) for head in heads]
    frozen = Frozen(
        encoder,
        readings,
        final_norm=settings.final_norm == "encoder",
        oracle=oracle,
        to_oracle=renormalised(settings, encoder, oracle),
    )
    return encoder, frozen, readings


def check_cache(settings: Settings, frozen: Frozen, number: int) -> None:
    """Raises SettingsError where the kept features would not fit."""
    gigabytes = number * frozen.width * 4 / 1e9
    if gigabytes > settings.cache_gb:
        raise SettingsError(
            f"cache_features=true: {number} pictures of {frozen.width} numbers take {gigabytes:.3g} GB, above "
            f"cache_gb={settings.cache_gb:g}; set cache_features=false, or raise cache_gb"
        )


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        heads = settings.all_heads
        encoder, frozen, readings = freeze(settings, heads)
        normalise = pictures.normaliser(settings, encoder)
        train, val = pictures.load(settings, "train"), pictures.load(settings, "val")
        same_classes(train, val)
        train = few(train, shots=settings.shots, fraction=settings.fraction, seed=settings.split_seed)
        centre: Transform = ResizeCenterCrop(encoder.image_size, settings.eval_crop)
        crops = {"none": lambda _: centre, "crop": RandomResizedCrop, "mae": OneShotCrop}
        crop: Transform = crops[settings.augment](encoder.image_size)

        read: list[DataLoader[Any]] = []  # the loaders that met the files
        autocast = torch.autocast(distributed.device().type, DTYPES[settings.amp], enabled=settings.amp != "none")

        def encode(each: Pictures) -> Cached:
            read.append(pictures.in_order(settings, each, centre))
            with autocast:
                return Cached(*probe.encoded(frozen.packed, read[-1], normalise), each.classes)

        if settings.cache_features:  # without augmentation every epoch sees the same pictures: encode them once
            check_cache(settings, frozen, len(train) + len(val))
            train, val = encode(train), encode(val)
            normalise = nn.Identity()
        loader = pictures.shuffled(settings, train, crop, settings.batch_size)
        val_loader = pictures.in_order(settings, val, centre)
        read = read or [loader, val_loader]

        def prepare(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return normalise(batch[0]), batch[1].to(distributed.device(), non_blocking=True)

        built = []
        for reading in readings:
            torch.manual_seed(distributed.fold(settings.seed))  # each begins as it would alone
            built.append(build_head(frozen.shapes[reading], len(train.classes), settings, encoder.has_cls))
        names = [head.name for head in heads] if settings.heads else []
        model = Probe(built, readings, frozen.unpack if settings.cache_features else frozen, names)
        model.to(distributed.device())
        peak = max(settings.peak_of(head) for head in heads)
        optimizer = build_optimizer(model, heads, settings, peak)
        best = Best(model)

        def measure() -> dict[str, float]:
            found = evaluate(model, val_loader, prepare, settings.amp)
            best.see(found[:, 0].tolist())
            return named(found, best.top1, names)

        warmup = settings.warmup_epochs / max(settings.epochs, 1)
        finished = fit(
            distributed.wrap(model),
            loader,
            optimizer,
            schedules={"lr": lambda t: warmup_cosine(t, peak=peak, warmup=warmup, floor=settings.min_lr)},
            checkpoint=Checkpoint(
                run.folder / rundir.CHECKPOINT, run.journal, model=model, optimizer=optimizer, best=best
            ),
            prepare=prepare,
            evaluate=measure,
            evaluate_epochs=settings.eval_freq or max(1, settings.epochs // 10),
            **loop(run),
        )
        if finished:
            done = steps(settings, len(loader))
            found = evaluate(model, val_loader, prepare, settings.amp)
            best.see(found[:, 0].tolist())
            metrics = named(found, best.top1, names) | pictures.skipped(settings, *read)
            save_heads(run, heads, val.classes, found, best)
            run.track(done, done, metrics)
            run.finish(metrics, done)


if __name__ == "__main__":
    main()
