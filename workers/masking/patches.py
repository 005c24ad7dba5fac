"""Images as patches, in row-major order, each flattened as (row, column, channel)."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(images: Tensor, patch: int, gap: int = 0, jitter: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """A ``patch`` x ``patch`` window of every cell of side ``patch + gap``: (B, C, H, W) -> (B, N, patch*patch*C).

    ``jitter`` holds the windows' offsets inside their cells, rows and columns, each (B, H/cell, W/cell) in [0, gap];
    without it the windows sit in the upper left corners.
    """
    b, c, h, w = images.shape
    cell = patch + gap
    if h % cell or w % cell:
        raise ValueError(f"image {h} x {w}: expected multiples of the cell, patch {patch} + gap {gap} = {cell}")
    rows, columns = h // cell, w // cell
    if jitter is None:
        cells = images.view(b, c, rows, cell, columns, cell)[:, :, :, :patch, :, :patch]
        return cells.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * columns, -1)
    within, picture = torch.arange(patch, device=images.device), torch.arange(b, device=images.device)
    top = jitter[0] + cell * torch.arange(rows, device=images.device)[:, None]
    left = jitter[1] + cell * torch.arange(columns, device=images.device)
    y, x = (top[..., None] + within)[..., :, None], (left[..., None] + within)[..., None, :]  # (B, rows, columns, p, p)
    return images[picture.view(b, 1, 1, 1, 1), :, y, x].reshape(b, rows * columns, -1)  # the sliced axis, C, comes last


def unpatchify(patches: Tensor, patch: int, rows: int) -> Tensor:
    """The inverse of ``patchify`` without gap: (B, N, patch*patch*C) -> (B, C, H, W) with H = rows * patch."""
    b, n, d = patches.shape
    cells = patches.view(b, rows, n // rows, patch, patch, d // patch**2)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * patch, n // rows * patch)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """``x[b, ids[b]]`` for every b: (B, N, D), (B, K) -> (B, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
