"""Numbers that the published programs produced: where they are, and how to read them.

``SIGHTLINE_GOLDEN`` points to another folder of the same layout. There, a kind of file that is missing is passed over;
in the repository's own set it is an error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

OWN = Path(__file__).parents[1] / "golden"
ROOT = Path(os.environ.get("SIGHTLINE_GOLDEN") or OWN)


def cases(pattern: str) -> Any:
    """The stored files that fit, such as ``lmim_mixmask/lmim_*_forward.npz``, for ``pytest.mark.parametrize``."""
    found = sorted(ROOT.glob(pattern))
    assert found or ROOT.resolve() != OWN.resolve(), f"{pattern}: nothing in {ROOT}"
    return [pytest.param(path, id=path.name) for path in found]


def arrays(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All arrays of a .npz or .safetensors file, the floating ones as ``dtype`` (None: as stored)."""
    if path.suffix == ".safetensors":
        found = load_file(path)
    else:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}
    return {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in found.items()}


def facts(path: Path) -> Any:
    return json.loads(path.read_text())


def assert_close(actual: Tensor, expected: Tensor, relative: float, what: str = "") -> None:
    """The largest difference is at most ``relative`` times the largest expected value."""
    actual, expected = actual.detach().double(), expected.double()
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= relative * max(size, 1e-6), f"{what}: off by {error:.3g} where values reach {size:.3g}"


def part(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What is stored below ``prefix``, such as ``sd.``, without it."""
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
