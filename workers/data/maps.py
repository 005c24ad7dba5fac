"""Maps that belong to the pictures of a data set, such as saliency maps: a .npy file, read where it lies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workers.data import DataError, shown

FILE, ABOUT = "saliency.npy", "saliency.json"
LOOKED_AT = 64  # maps, from all over the file, of which one at least must not be flat


class Maps:
    """``maps[indices]``: (B, 1, side, side) float32 of the pictures at these places.

    ``where`` is the run directory of ``worker=make_saliency``, or a file (n, 1, side, side) or (n, side, side) of
    numbers. Raises DataError, in one line, where it is missing, or of other pictures or another size, or flat.
    """

    def __init__(self, where: Path, number: int, side: int, fingerprint: str | None = None):
        path = where / FILE if where.is_dir() else where
        if not path.is_file():
            raise DataError(f"saliency_path={shown(where)}: no file {shown(path)}; worker=make_saliency makes it")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"saliency_path={shown(path)}: not a .npy file ({' '.join(str(error).split())})") from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fui":
            raise DataError(f"saliency_path={shown(path)}: expected one array of numbers")
        maps = array[:, None] if array.ndim == 3 else array
        if maps.shape[1:] != (1, side, side):
            raise DataError(
                f"saliency_path={shown(path)}: maps of {' x '.join(map(str, array.shape[1:]))}, expected "
                f"1 x {side} x {side}, as the pictures"
            )
        if len(maps) != number:
            raise DataError(f"saliency_path={shown(path)}: {len(maps)} maps for {number} pictures")
        said = path.with_name(ABOUT)
        known = json.loads(said.read_text()).get("fingerprint") if fingerprint and said.is_file() else None
        if known not in (None, fingerprint):
            raise DataError(f"saliency_path={shown(path)}: maps of other pictures ({known} instead of {fingerprint})")
        self.path, self.maps = path, maps
        some = self[torch.arange(0, number, max(1, number // LOOKED_AT))].flatten(1)
        if bool((some.amax(1) == some.amin(1)).all()):
            raise DataError(f"saliency_path={shown(path)}: the maps are flat, they say nothing; augment=uniform_crop")

    def __getitem__(self, index: Tensor) -> Tensor:
        found = torch.from_numpy(np.ascontiguousarray(self.maps[index.cpu().numpy()], np.float32))
        if not bool(found.isfinite().all()):
            bad = index[~found.isfinite().flatten(1).all(1)][0]
            raise DataError(f"saliency_path={shown(self.path)}: the map of picture {int(bad)} is not finite")
        return found
