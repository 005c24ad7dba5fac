"""The vision transformer (Dosovitskiy et al., ICLR 2021) of masked image modelling: it embeds only what it may see.

The names in the state dict are those of MAE and timm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.masking.patches import patchify, take
from workers.models import Encoder, Look

PRESETS: dict[str, dict[str, int]] = {
    "vit_nano": {"dim": 96, "depth": 4, "heads": 3},
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
    "vit_huge": {"dim": 1280, "depth": 32, "heads": 16},
}
EPS = 1e-6  # of every LayerNorm here

Positions = Literal["lmim", "mae"]


def sincos(rows: int, columns: int, dim: int, kind: Positions = "lmim") -> Tensor:
    """The fixed table of 2-D sines and cosines, a row of zeros for the class token first: (1, 1 + rows*columns, dim).

    The four quarters of a row are sin(u w), cos(u w), sin(v w), cos(v w), where w_k = 10000^(-4k/dim) and the patch at
    (row, column) sits at v = row, u = column ("mae"), or at these stretched such that the last patch of an axis with
    g patches sits at g rather than g - 1 ("lmim").
    """
    if dim % 4:
        raise ValueError(f"width {dim}: the position table needs a multiple of 4")
    dtype = torch.float64 if kind == "mae" else torch.float32  # as the programs of these names
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=dtype) / (dim / 4))
    v, u = torch.arange(rows, dtype=dtype), torch.arange(columns, dtype=dtype)
    if kind == "lmim":
        v, u = v * rows / max(rows - 1, 1), u * columns / max(columns - 1, 1)
    v, u = (x.flatten()[:, None] * frequency for x in torch.meshgrid(v, u, indexing="ij"))
    table = torch.cat([u.sin(), u.cos(), v.sin(), v.cos()], dim=1)
    return F.pad(table, (0, 0, 1, 0))[None].float()


def interpolated(table: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """A position table (1, prefix + N, D), N patches on a square grid, stretched to another ``grid`` of patches.

    Bicubic without antialiasing, as MAE's programs do it; the first ``prefix`` rows stay as they are.
    """
    rows = math.isqrt(table.shape[1] - prefix)
    if rows * rows != table.shape[1] - prefix:
        raise ValueError(f"a position table of {table.shape[1] - prefix} patches is not one of a square grid")
    if (rows, rows) == grid:
        return table
    places = table[:, prefix:].reshape(1, rows, rows, -1).permute(0, 3, 1, 2)
    places = F.interpolate(places, grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix], places.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer and patch embedding below ``module``."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight.view(len(part.weight), -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class PatchEmbed(nn.Module):
    """A strided convolution, computed as a product so that it applies to any selection of patches."""

    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, patch*patch*3), flattened as (row, column, channel) -> (B, N, D)"""
        return F.linear(patches, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class DropPath(nn.Module):
    """Stochastic depth: leaves a residual branch out for some of the samples."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate) if self.rate < 1 else x * keep


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, drop: float = 0.0, attn_drop: float = 0.0):
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        q, k, v = self.split(x)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        x = self.drop(self.proj(x.transpose(1, 2).flatten(2)))
        return x

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (B, H, N, N), and what ``forward`` gives in evaluation."""
        q, k, v = self.split(x)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return logits, self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, N, D / H)."""
        q, k, v = (z.transpose(1, 2) for z in self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2))
        return q, k, v


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return x


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop: float, attn_drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, drop, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)"""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def look(self, x: Tensor) -> Look:
        """``forward`` in evaluation, and what happens on the way."""
        logits, branch = self.attn.look(self.norm1(x))
        middle = x + branch
        return Look(x, logits, branch, middle + self.mlp(self.norm2(middle)))


class ViT(Encoder):
    """A ViT over a grid of ``grid_size`` rows and ``grid_columns`` columns (None: as many) of patches.

    ``cls=False`` is one without a token for the whole picture (I-JEPA). ``drop_path`` is the rate of every block or,
    with ``drop_path_linear``, that of the last, to which the rates rise from 0.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        patch_size: int,
        grid_size: int,
        grid_columns: int | None = None,
        mlp_ratio: float = 4.0,
        pos: Positions = "lmim",
        learn_pos: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        drop_path_linear: bool = False,
        cls: bool = True,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim}: must be a multiple of heads={heads}")
        self.width, self.patch_size, self.grid = dim, patch_size, (grid_size, grid_columns or grid_size)
        self.image_size, self.depth, self.heads, self.has_cls = grid_size * patch_size, depth, heads, cls
        self.patch_embed = PatchEmbed(patch_size, dim)
        if cls:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        table = sincos(*self.grid, dim, pos)[:, 0 if cls else 1 :]
        if learn_pos:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table)
        rates = [drop_path * i / max(depth - 1, 1) if drop_path_linear else drop_path for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, drop, attn_drop, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        xavier(self)

    @property
    def patches(self) -> int:
        """How many patches a picture has."""
        return self.grid[0] * self.grid[1]

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """``tokens`` after the final norm."""
        return self.final(self.tokens(images, ids))

    def tokens(self, images: Tensor, ids: Tensor | None = None, *, block: int | None = None) -> Tensor:
        """The output of ``block`` (None: the last), class token or zeros first: (B, 1 + N, D).

        ``images`` is (B, 3, H, W), of which ``ids`` (B, N) selects patches (None: all); or it is those patches already,
        (B, N, patch*patch*3), and ``ids`` says where they are from.
        """
        run = self.through(block)
        x = self.embed(images, ids)
        for each in itertools.islice(self.blocks, run):
            x = each(x)
        return x if self.has_cls else F.pad(x, (0, 0, 1, 0))

    def final(self, tokens: Tensor) -> Tensor:
        """The norm, (B, 1 + N, D) -> (B, 1 + N, D)."""
        out: Tensor = self.norm(tokens)
        return out if self.has_cls else F.pad(out[:, 1:], (0, 0, 1, 0))

    def look(self, images: Tensor) -> Iterator[Look]:
        """All blocks in order, with the logits of their attention."""
        x = self.embed(images)
        for block in self.blocks:
            assert isinstance(block, Block)
            look = block.look(x)
            x = look.output
            yield look
            del look  # one block's attention at a time

    def embed(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        """What enters the first block, of the arguments of ``tokens``: (B, 1 + N, D), without class token (B, N, D)."""
        if images.ndim == 4:
            images = self.patchify(images)
            images = images if ids is None else take(images, ids)
        places = self.pos_embed[:, int(self.has_cls) :]
        x: Tensor = self.patch_embed(images) + (places if ids is None else places[0][ids])
        if self.has_cls:
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        return x

    def patchify(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, patch*patch*3), for pictures of the size that the positions are for."""
        height, width = (side * self.patch_size for side in self.grid)
        if images.shape[2:] != (height, width):
            raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} pixels: expected {height} x {width}")
        return patchify(images, self.patch_size)


build = ViT
