"""An encoder as ``detectron2.pkl``, which Detectron2 takes as MODEL.WEIGHTS (ViTDet: ``train.init_checkpoint``).

The file is read back, mapped to our names and compared tensor by tensor before the run counts as finished.
``done.json`` says what was left out and why, and under ``model`` what Detectron2 has to be told for the rest to fit:
keys of its configuration for a ResNet, arguments of its ``ViT`` for a vision transformer.
"""

from __future__ import annotations

import logging
from pathlib import Path

from contract import rundir
from contract.settings.export_detectron import Settings
from workers.engine import distributed
from workers.engine.encoder import EncoderError, load_encoder
from workers.engine.run import open_run
from workers.interop import detectron_names, detectron_pickle
from workers.interop.detectron_names import Named
from workers.models import Encoder

log = logging.getLogger(__name__)

FILE = "detectron2.pkl"


def named(encoder: Encoder) -> Named:
    """Raises EncoderError for one that Detectron2 has no network for."""
    try:
        return detectron_names.named(encoder)
    except ValueError as error:
        raise EncoderError(str(error)) from None


def write(folder: Path, encoder: Encoder) -> Named:
    """Write and check ``detectron2.pkl``. Raises EncoderError for an encoder that does not fit."""
    found = named(encoder)
    path = folder / FILE
    rundir.write_atomic(path, detectron_pickle.written(detectron_names.content(found.arrays)))
    stored = detectron_pickle.read(path.read_bytes())["model"]
    if wrong := detectron_names.differences(encoder, stored, found.own):
        raise EncoderError(f"{path}: {len(wrong)} tensors do not come back as they were, first {wrong[0]}")
    for name, why in found.left_out.items():
        log.info("left out: %s (%s)", name, why)
    return found


def main() -> None:
    with open_run(Settings) as run:
        s = run.settings
        encoder = load_encoder(s.encoder, checkpoint_key=s.checkpoint_key, heads=s.heads)
        found = write(run.folder, encoder) if distributed.rank() == 0 else named(encoder)
        metrics = {"export/tensors": float(len(found.arrays)), "export/left_out": float(len(found.left_out))}
        run.track(1, 1, metrics)
        run.finish(metrics, 1, file=FILE, model=found.model, left_out=found.left_out)


if __name__ == "__main__":
    main()
