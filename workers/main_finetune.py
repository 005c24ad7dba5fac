"""Fine-tuning of a whole encoder for classification (He et al., CVPR 2022, appendix A.1, after Bao et al., ICLR 2022).

``finetune/top1``, ``top5`` and ``loss`` are measured on the validation split, every picture once; ``encoder.pt`` is the
fine-tuned encoder, for statistics and probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contract import rundir
from contract.settings.checks import SettingsError
from contract.settings.main_finetune import Settings
from workers.data.few import same_classes
from workers.data.loader import Transform
from workers.engine import distributed, optim, pictures
from workers.engine.checkpoint import Checkpoint
from workers.engine.encoder import save_encoder
from workers.engine.fit import DTYPES, fit
from workers.engine.optim import warmup_cosine
from workers.engine.retrained import load_trainable
from workers.engine.run import loop, open_run, steps
from workers.models import Encoder
from workers.models.vit import EPS
from workers.transforms.augment import InTurn, RandAugment
from workers.transforms.crops import RandomResizedCrop, ResizeCenterCrop
from workers.transforms.mixing import Draw, Mixing, erased, smoothed

BETAS = (0.9, 0.999)  # of AdamW
HEAD_STD = 2e-5  # the classifier begins at nothing, so the first steps do not upset the encoder


class Classifier(nn.Module):
    """An encoder and a linear layer on the mean of its patches, with a norm of its own, or on its class token."""

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        pool: Literal["gap", "cls"] = "gap",
        mixing: Mixing | None = None,
        smoothing: float = 0.0,
        reprob: float = 0.0,
    ):
        super().__init__()
        if pool == "cls" and not encoder.has_cls:
            raise SettingsError("pool=cls: this encoder has no class token; choose pool=gap")
        self.encoder, self.classes, self.pool = encoder, classes, pool
        self.mixing, self.smoothing, self.reprob = mixing or Mixing(), smoothing, reprob
        self.fc_norm = nn.LayerNorm(encoder.width, eps=EPS) if pool == "gap" else None
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        for name, p in encoder.named_parameters():  # what no picture's loss depends on
            if name == "mask_token" or (pool == "gap" and bare(name).startswith(("norm.", "fc_norm."))):
                p.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)"""
        tokens = self.encoder.tokens(images)
        if self.fc_norm is None:
            return self.encoder.final(tokens)[:, 0]
        out: Tensor = self.fc_norm(tokens[:, 1:].mean(1))
        return out

    def logits(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(images))
        return out

    def forward(self, batch: tuple[Tensor, Tensor], draw: Draw | None = None) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) and labels (B,) -> the cross-entropy to smoothed and mixed targets."""
        images, labels = batch
        targets = smoothed(labels, self.classes, self.smoothing)
        if self.reprob:
            images = erased(images, self.reprob)
        draw = draw or self.mixing.draw(*images.shape[-2:])
        if draw is not None:
            images, targets = self.mixing.mixed(images, targets, draw)
        return {"loss": F.cross_entropy(self.logits(images).float(), targets)}


def bare(name: str) -> str:
    """A parameter's name without where its encoder is kept."""
    return name.removeprefix("encoder.").removeprefix("model.")


def layer_of(name: str, depth: int) -> int:
    """0 for what comes before the blocks, then the blocks from 1, and depth + 1 for all that is left."""
    name = bare(name)
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    before = ("cls_token", "mask_token", "pos_embed", "patch_embed")
    return 0 if name.startswith(before) else depth + 1


def groups(named: Iterable[tuple[str, nn.Parameter]], depth: int, settings: Settings) -> list[dict[str, Any]]:
    """Parameters by layer, without and with weight decay; a layer's rate is ``layer_decay`` times that of the next."""
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in named:
        if p.requires_grad:
            decays = p.ndim > 1 and not bare(name).startswith(("cls_token", "pos_embed"))
            found.setdefault((layer_of(name, depth), decays), []).append(p)
    return [
        {
            "params": params,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "lr_scale": settings.layer_decay ** (depth + 1 - layer),
        }
        for (layer, decays), params in sorted(found.items(), key=lambda each: each[0])
    ]


def build(settings: Settings, encoder: Encoder, classes: int) -> Classifier:
    s = settings
    mixing = Mixing(s.mixup, s.cutmix, s.mixup_prob, s.mixup_switch_prob)
    return Classifier(encoder, classes, pool=s.pool, mixing=mixing, smoothing=s.smoothing, reprob=s.reprob)


def transform(settings: Settings, encoder: Encoder) -> Transform:
    size, mean = encoder.image_size, encoder.mean or settings.data.mean
    crop = RandomResizedCrop(size, scale=(settings.min_crop, 1.0), hflip=settings.hflip)
    return crop if settings.aa is None else InTurn(crop, RandAugment(settings.aa, size, mean))


def schedules(settings: Settings) -> dict[str, Callable[[float], float]]:
    """The learning rate, of the fraction of training done; a group takes its ``lr_scale`` of it."""
    s, warmup = settings, settings.warmup_epochs / max(settings.epochs, 1)
    return {"lr": lambda t: warmup_cosine(t, peak=s.peak_lr, warmup=warmup, floor=s.min_lr)}


@torch.no_grad()
def evaluate(model: Classifier, loader: DataLoader[Any], prepare: Any, amp: str = "none") -> dict[str, float]:
    """Top-1, top-5 and loss over all ranks, every picture counted once."""
    model.eval()
    distributed.agree(model.buffers())  # a rank's own running estimates are a step ahead of those that are saved
    device = distributed.device()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in loader:
        images, labels = prepare(batch)
        with torch.autocast(device.type, DTYPES[amp], enabled=amp != "none"):
            logits = model.logits(images)
        hit = logits.topk(min(5, model.classes), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        sums += torch.stack([hit[:, 0].sum(), hit.sum(), loss, loss.new_tensor(len(hit))]).to(sums)
    top1, top5, loss, number = distributed.total(sums).tolist()
    return {"finetune/top1": top1 / number, "finetune/top5": top5 / number, "finetune/loss": loss / number}


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        encoder = load_trainable(settings.encoder, drop_path=settings.drop_path, input_size=settings.input_size)
        train, val = pictures.load(settings, "train"), pictures.load(settings, "val")
        same_classes(train, val)
        normalise = pictures.normaliser(settings, encoder)
        loader = pictures.shuffled(settings, train, transform(settings, encoder), settings.batch_size)
        centre = ResizeCenterCrop(encoder.image_size, settings.eval_crop)
        val_loader = pictures.in_order(settings, val, centre)

        torch.manual_seed(distributed.fold(settings.seed))  # the same classifier on every rank
        model = build(settings, encoder, len(train.classes)).to(distributed.device())
        parts = groups(model.named_parameters(), encoder.depth, settings)
        optimizer = optim.adamw(parts, lr=settings.peak_lr, betas=BETAS)

        def prepare(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return normalise(batch[0]), batch[1].to(distributed.device(), non_blocking=True)

        def measure() -> dict[str, float]:
            return evaluate(model, val_loader, prepare, settings.amp)

        finished = fit(
            distributed.wrap(model),
            loader,
            optimizer,
            schedules=schedules(settings),
            checkpoint=Checkpoint(run.folder / rundir.CHECKPOINT, run.journal, model=model, optimizer=optimizer),
            prepare=prepare,
            evaluate=measure,
            evaluate_epochs=settings.eval_freq,
            **loop(run),
        )
        if finished:
            done = steps(settings, len(loader))
            metrics = measure() | pictures.skipped(settings, loader, val_loader)
            run.track(done, done, metrics)
            save_encoder(run.folder, encoder, run.identity)
            run.finish(metrics, done)


if __name__ == "__main__":
    main()
