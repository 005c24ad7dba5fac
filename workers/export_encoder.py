"""An encoder as a file for other programs, and other programs' files as an encoder.

Every run of it writes ``encoder.pt``, which our evaluations read, so that what is odd about a published file is settled
once. ``format=timm`` adds ``timm.safetensors``, and ``done.json`` says how timm reads it:
``timm.create_model(timm.model, checkpoint_path=timm.file, **timm.kwargs)``. ``format=safetensors`` adds
``encoder.safetensors`` with our names of the tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from contract import rundir
from contract.settings.export_encoder import Settings
from workers.engine import distributed
from workers.engine.encoder import EncoderError, described, load_encoder, save_encoder
from workers.engine.run import open_run
from workers.engine.weights import metadata
from workers.interop import timm_names
from workers.models import Encoder
from workers.models.timm_model import TimmModel

TOLERANCE = 1e-3  # between features of about unit size, ours and timm's


def write_timm(folder: Path, encoder: Encoder) -> tuple[dict[str, Any], float]:
    """Write ``timm.safetensors``; how timm reads it, and the largest difference of the features that it then gives."""
    try:
        name, kwargs, state = timm_names.named(encoder)
    except ValueError as error:
        raise EncoderError(f"format=timm: {error}") from None
    path = folder / "timm.safetensors"
    rundir.write_atomic(path, save({k: v.cpu().contiguous() for k, v in state.items()}))
    theirs: Any = timm.create_model(name, checkpoint_path=str(path), **kwargs).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=generator)
    with torch.no_grad():
        expected = _features(encoder.cpu(), images)
        off = (expected - theirs.forward_features(images)).abs().max().item()
    if not off <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise EncoderError(f"format=timm: timm's {name} gives other features, off by {off:.3g}")
    return {"model": name, "kwargs": kwargs, "file": path.name}, off


def _features(encoder: Encoder, images: Tensor) -> Tensor:
    """As timm's ``forward_features`` has them."""
    if isinstance(encoder, TimmModel):
        found: Tensor = encoder.model.forward_features(images)
        return found
    return encoder.final(encoder.tokens(images))[:, 0 if encoder.has_cls else 1 :]


def main() -> None:
    with open_run(Settings) as run:
        s = run.settings
        encoder = load_encoder(s.encoder, image_size=s.image_size, checkpoint_key=s.checkpoint_key, heads=s.heads)
        save_encoder(run.folder, encoder, run.identity)
        more: dict[str, Any] = {}
        metrics = {"export/parameters": float(sum(p.numel() for p in encoder.parameters()))}
        if distributed.rank() == 0 and s.format == "timm":
            more["timm"], metrics["export/error"] = write_timm(run.folder, encoder)
        if distributed.rank() == 0 and s.format == "safetensors":
            text = metadata(**described(encoder, run.identity))
            state = {k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}
            rundir.write_atomic(run.folder / "encoder.safetensors", save(state, metadata=text))
            more["file"] = "encoder.safetensors"
        run.track(1, 1, metrics)
        run.finish(metrics, 1, **more)


if __name__ == "__main__":
    main()
