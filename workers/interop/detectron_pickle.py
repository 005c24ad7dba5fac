"""The one pickle that we write, since Detectron2 reads no other file; and a reader in which nothing can run.

numpy before 1.26 cannot read it: the arrays are stored as numpy 2 does.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np

ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}
"""What a file of arrays asks for."""


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def written(content: dict[str, Any]) -> bytes:
    return pickle.dumps(content, protocol=4)


def read(data: bytes) -> dict[str, Any]:
    """The three entries of such a file. Raises ValueError, in one line, for anything else."""
    try:
        found: Any = _Arrays(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise ValueError(f"not a file of arrays for Detectron2: {str(error) or type(error).__name__}") from None
    arrays = found.get("model") if isinstance(found, dict) else None
    if not isinstance(arrays, dict) or not all(
        isinstance(name, str) and isinstance(each, np.ndarray) and each.dtype != object for name, each in arrays.items()
    ):
        raise ValueError("not a file of arrays for Detectron2: no arrays under 'model'")
    return dict(found)
