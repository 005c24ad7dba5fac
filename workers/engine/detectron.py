"""Our encoders as files that Detectron2 reads, and what our runs ask of it."""

from __future__ import annotations

import logging
from pathlib import Path

from contract import rundir
from workers.interop import detectron_names, detectron_pickle
from workers.interop.detectron_names import Named
from workers.models import Encoder

from .encoder import EncoderError

log = logging.getLogger(__name__)

FILE = "detectron2.pkl"


def named(encoder: Encoder) -> Named:
    """Raises EncoderError for one that Detectron2 has no network for."""
    try:
        return detectron_names.named(encoder)
    except ValueError as error:
        raise EncoderError(str(error)) from None


def write(folder: Path, encoder: Encoder) -> Named:
    """Write ``detectron2.pkl``, read it back, and compare every tensor. Raises EncoderError."""
    found = named(encoder)
    path = folder / FILE
    rundir.write_atomic(path, detectron_pickle.written(detectron_names.content(found.arrays)))
    stored = detectron_pickle.read(path.read_bytes())["model"]
    if wrong := detectron_names.differences(encoder, stored, found.own):
        raise EncoderError(f"{path}: {len(wrong)} tensors do not come back as they were, first {wrong[0]}")
    for name, why in found.left_out.items():
        log.info("left out: %s (%s)", name, why)
    return found
