"""``encoder.pt``: what every evaluation reads, whatever method made it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from contract import rundir
from workers import models
from workers.models import Encoder

from . import distributed


class EncoderError(Exception):
    """An encoder file that is missing or does not fit; one line for the user."""


def save_encoder(folder: Path, encoder: Encoder, identity: str) -> None:
    """Write {"name", "kwargs", "state", "from"}; ``name`` and ``kwargs`` rebuild the module, ``from`` is the run."""
    if distributed.rank():
        return
    buffer = io.BytesIO()
    state = {key: value.cpu() for key, value in encoder.state_dict().items()}
    torch.save({"name": encoder.name, "kwargs": encoder.kwargs, "state": state, "from": identity}, buffer)
    rundir.write_atomic(folder / rundir.ENCODER, buffer.getvalue())


def load_encoder(where: str) -> Encoder:
    """The frozen encoder of a run directory or of an ``encoder.pt``, on this process's device.

    It has ``tokens(images)`` -> (B, 1+N, D) and ``image_size``. Raises EncoderError, naming the file and the keys.
    """
    path = Path(where)
    if path.is_dir():
        path = path / rundir.ENCODER
    if not path.is_file():
        raise EncoderError(f"encoder={where}: no file {path}; has the run that makes it finished?")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        name, kwargs, state = saved["name"], saved["kwargs"], saved["state"]
    except UnpicklingError as error:
        raise EncoderError(f"{path}: not an encoder.pt (holds more than tensors and plain values)") from error
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile, KeyError, TypeError) as error:
        raise EncoderError(f"{path}: not an encoder.pt ({str(error).splitlines()[0]})") from error
    encoder = models.build(name, kwargs)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise EncoderError(f"{path}: does not fit {name}({kwargs}): {' '.join(str(error).split())}") from None
    return encoder.to(distributed.device()).eval().requires_grad_(False)
