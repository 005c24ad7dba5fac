"""Files of weights, read such that nothing in them can run."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    SafetensorError,
)
"""What readers throw at a file that is cut short or of another kind."""


class EncoderError(Exception):
    """An encoder that is missing or does not fit; one line for the user."""


class Inert:
    """Stands in for a class of a published file: takes whatever it is given, and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class InertMapping(Inert):
    """The same for a mapping, whose items torch gives to none but its own kinds."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def stand_in(name: str, kind: type[Inert] = Inert) -> type[Inert]:
    """One under another class's full name, which is how a file asks for it."""
    module, _, short = name.rpartition(".")
    return type(short, (kind,), {"__module__": module, "__qualname__": short})


STAND_INS: list[Any] = [
    argparse.Namespace,
    stand_in("yacs.config.CfgNode", InertMapping),
    *(
        stand_in(name)
        for name in (
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.dtype",
            *(f"numpy.dtypes.{kind}DType" for kind in ("Float32", "Float64", "Int32", "Int64", "Bool", "Str")),
            "pathlib.PosixPath",
            "pathlib._local.PosixPath",
        )
    ),
]
"""What published checkpoints hold beside tensors and plain values: arguments, configurations, best accuracies."""


def read(path: Path) -> tuple[Any, dict[str, str]]:
    """A file's content and, of a .safetensors, its text metadata. Raises EncoderError in one line."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True), {}
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is damaged, or no file of weights"
        raise EncoderError(f"{path}: refused, since it holds more than tensors and plain values: {what}") from error
    except DAMAGED as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise EncoderError(f"{path}: cut short, damaged, or no file of weights ({said[0]})") from error


def metadata(**described: Any) -> dict[str, str]:
    """The text that lets a .safetensors be read back as one of our encoders."""
    return {"sightline": json.dumps(described)}
