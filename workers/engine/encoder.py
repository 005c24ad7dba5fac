"""Frozen encoders: ``encoder.pt``, what every evaluation reads whatever method made it, and other people's files."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from contract import rundir
from contract.settings.resnet import NEW
from workers import models
from workers.interop import published
from workers.models import Encoder

from . import distributed, weights
from .weights import EncoderError

__all__ = ["EncoderError", "load_encoder", "save_encoder"]

log = logging.getLogger(__name__)

TIMM = "timm:"


def save_encoder(folder: Path, encoder: Encoder, identity: str) -> None:
    """Write {"name", "kwargs", "state", "from"}; ``name`` and ``kwargs`` rebuild the module, ``from`` is the run.

    An encoder with a pixel normalisation of its own adds {"mean", "std"}.
    """
    if distributed.rank():
        return
    buffer = io.BytesIO()
    state = {key: value.cpu() for key, value in encoder.state_dict().items()}
    torch.save({**described(encoder, identity), "state": state}, buffer)
    rundir.write_atomic(folder / rundir.ENCODER, buffer.getvalue())


def described(encoder: Encoder, identity: str) -> dict[str, Any]:
    """All of ``encoder.pt`` but the weights."""
    found: dict[str, Any] = {"name": encoder.name, "kwargs": encoder.kwargs, "from": identity}
    if encoder.mean is not None and encoder.std is not None:
        found |= {"mean": list(encoder.mean), "std": list(encoder.std)}
    return found


def load_encoder(
    where: str, *, image_size: int | None = None, checkpoint_key: str | None = None, heads: int | None = None
) -> Encoder:
    """The frozen encoder on this process's device; says in the log what it read.

    ``where`` is a run directory, an ``encoder.pt``, a published program's file, ``timm:NAME`` (from timm's cache),
    ``timm:NAME@FILE``, or ``new:ARCH``, a ResNet drawn from torch's generator. ``image_size`` stretches its positions
    for pictures of another side; ``checkpoint_key`` and ``heads`` are for published files that leave these open. Raises
    EncoderError, naming the file and the keys.
    """
    try:
        if where.startswith(NEW):
            encoder = models.build("resnet", {"arch": where.removeprefix(NEW)})
            words = "freshly initialised"
        elif where.startswith(TIMM):
            encoder, words = _of_timm(where, image_size, checkpoint_key)
        else:
            encoder, words = _of_file(where, checkpoint_key, heads)
        if image_size is not None and image_size != encoder.image_size:
            words += f"; positions stretched from {encoder.image_size} to {image_size} pixels"
            encoder = published.resized(encoder, image_size)
    except ValueError as error:
        raise EncoderError(f"encoder={where}: {error}") from None
    if distributed.rank() == 0:
        log.info("encoder=%s: %s", where, words)
    return encoder.to(distributed.device()).eval().requires_grad_(False)


def _of_file(where: str, checkpoint_key: str | None, heads: int | None) -> tuple[Encoder, str]:
    path = Path(where)
    if path.is_dir():
        path = path / rundir.ENCODER
    if not path.is_file():
        raise EncoderError(f"encoder={where}: no file {path}; has the run that makes it finished?")
    saved, text = weights.read(path)
    if not isinstance(saved, dict):
        raise EncoderError(f"{path}: no weights in it, but {type(saved).__name__}")
    if "sightline" in text:
        return _ours(path, {**json.loads(text["sightline"]), "state": saved})
    if {"name", "kwargs", "state"} <= set(saved):
        return _ours(path, saved)
    if path.name == rundir.ENCODER:
        raise EncoderError(f"{path}: not an encoder.pt (holds {', '.join(map(str, list(saved)[:5])) or 'nothing'})")
    return published.encoder(saved, key=checkpoint_key, heads=heads)


def _ours(path: Path, saved: Mapping[str, Any]) -> tuple[Encoder, str]:
    name, kwargs = saved["name"], saved["kwargs"]
    try:
        encoder = models.build(name, kwargs)
        encoder.load_state_dict(saved["state"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise EncoderError(f"{path}: does not fit {name}({kwargs}): {' '.join(str(error).split())}") from None
    if saved.get("mean"):
        (r, g, b), (sr, sg, sb) = saved["mean"], saved["std"]
        encoder.mean, encoder.std = (r, g, b), (sr, sg, sb)
    return encoder, f"{name}, {encoder.image_size} x {encoder.image_size} pixels, from {saved.get('from', '?')}"


def _of_timm(where: str, image_size: int | None, checkpoint_key: str | None) -> tuple[Encoder, str]:
    from workers.interop import timm_names  # timm takes a second to import

    name, _, file = where.removeprefix(TIMM).partition("@")
    path = Path(file) if file else timm_names.cached(name)
    if not path.is_file():
        raise EncoderError(f"encoder={where}: no file {path}")
    saved, text = weights.read(path)
    if not isinstance(saved, dict):
        raise EncoderError(f"{path}: no weights in it, but {type(saved).__name__}")
    if "sightline" in text or {"name", "kwargs", "state"} <= set(saved):
        raise EncoderError(f"encoder={where}: the file is an encoder of ours; give encoder={path}")
    return timm_names.filled(name, saved, image_size, checkpoint_key)
