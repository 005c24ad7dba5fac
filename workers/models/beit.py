"""The vision transformer of SimMIM (Xie et al., CVPR 2022), which is that of BEiT (Bao et al., ICLR 2022): it embeds
all patches, the hidden ones as a mask token.

Unlike ``vit.py``: learned biases for relative positions, layer scale, and no bias for the keys. The names in the state
dict are those of both programs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.masking.patches import patchify
from workers.models import Encoder, Look
from workers.models.vit import EPS, DropPath, Mlp, PatchEmbed

STD = 0.02  # of every weight at the start, cut off at one standard deviation

Bias = Literal["shared", "per_block"]


def position_index(rows: int, columns: int) -> Tensor:
    """The row of the bias table for each pair (query, key) of the class token and the patches: (1 + N, 1 + N).

    Patches share a row by how far apart they are, up and across. The last three rows are for what the class token looks
    at, for what looks at it, and for it looking at itself.
    """
    r, c = (x.flatten() for x in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    down, right = r[:, None] - r + rows - 1, c[:, None] - c + columns - 1
    last = (2 * rows - 1) * (2 * columns - 1)
    index = F.pad(down * (2 * columns - 1) + right, (1, 0, 1, 0))
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index


class RelativeBias(nn.Module):
    """What is added to the logits for the places of query and key, one table entry per head and offset."""

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        rows, columns = grid
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, heads))
        self.register_buffer("relative_position_index", position_index(rows, columns))

    def bias(self) -> Tensor:
        """(H, 1 + N, 1 + N)"""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class Attention(RelativeBias):
    """Multi-head self-attention with biases for queries and values, and with its own table where it has a ``grid``."""

    def __init__(self, dim: int, heads: int, drop: float, attn_drop: float, grid: tuple[int, int] | None):
        if grid is not None:
            super().__init__(grid, heads)
        else:
            nn.Module.__init__(self)
        self.heads, self.attn_drop, self.own_table = heads, attn_drop, grid is not None
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """(B, T, D), (H, T, T) -> (B, T, D)"""
        q, k, v = self.split(x)
        bias = self.bias() if self.own_table else shared
        bias = None if bias is None else bias.to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, bias, self.attn_drop if self.training else 0.0)
        x = self.drop(self.proj(x.transpose(1, 2).flatten(2)))
        return x

    def look(self, x: Tensor, shared: Tensor | None) -> tuple[Tensor, Tensor]:
        """The logits (B, H, T, T), and what ``forward`` gives in evaluation."""
        q, k, v = self.split(x)
        bias = self.bias() if self.own_table else shared
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = logits if bias is None else logits + bias
        return logits, self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, D / H)."""
        offsets = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, offsets)
        q, k, v = (z.transpose(1, 2) for z in qkv.reshape(*x.shape[:2], 3, self.heads, -1).unbind(2))
        return q, k, v


class Block(nn.Module):
    """A pre-norm block whose branches are scaled by learned vectors (Touvron et al., ICCV 2021)."""

    def __init__(self, attn: Attention, dim: int, mlp_ratio: float, drop: float, drop_path: float, scale: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """(B, T, D), (H, T, T) -> (B, T, D)"""
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x), shared))
        x = x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
        return x

    def look(self, x: Tensor, shared: Tensor | None) -> Look:
        """``forward`` in evaluation, and what happens on the way."""
        logits, branch = self.attn.look(self.norm1(x), shared)
        middle = x + self.gamma_1 * branch
        return Look(x, logits, branch, middle + self.gamma_2 * self.mlp(self.norm2(middle)))


class BEiT(Encoder):
    """``bias`` is one table for all blocks ("shared"), or one in each ("per_block"); ``absolute`` adds a table of
    positions to the tokens; ``drop_path`` is the rate of the last block, to which the rates rise from 0."""

    pos_embed: Tensor

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        patch_size: int,
        grid_size: int,
        mlp_ratio: float = 4.0,
        bias: Bias = "shared",
        absolute: bool = False,
        mask_token: bool = True,
        layer_scale: float = 0.1,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.1,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim}: must be a multiple of heads={heads}")
        self.width, self.patch_size, self.grid = dim, patch_size, (grid_size, grid_size)
        self.image_size, self.depth, self.heads = grid_size * patch_size, depth, heads
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if mask_token else None
        if absolute:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patches, dim))
        self.absolute = absolute
        self.rel_pos_bias = RelativeBias(self.grid, heads) if bias == "shared" else None
        table = self.grid if bias == "per_block" else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        attentions = [Attention(dim, heads, drop, attn_drop, table) for _ in rates]
        self.blocks = nn.ModuleList(
            Block(attn, dim, mlp_ratio, drop, rate, layer_scale) for attn, rate in zip(attentions, rates, strict=True)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self._start()

    @property
    def patches(self) -> int:
        """How many patches a picture has."""
        return self.grid[0] * self.grid[1]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """``tokens`` after the final norm."""
        return self.final(self.tokens(images, mask))

    def tokens(self, images: Tensor, mask: Tensor | None = None, *, block: int | None = None) -> Tensor:
        """The output of ``block`` (None: the last), class token first: (B, 1 + N, D).

        images (B, 3, H, W); ``mask`` (B, N), True where the mask token stands in for the patch.
        """
        run = self.through(block)
        x, bias = self.embed(images, mask), self._shared()
        for each in itertools.islice(self.blocks, run):
            x = each(x, bias)
        return x

    def final(self, tokens: Tensor) -> Tensor:
        """The norm, (B, 1 + N, D) -> (B, 1 + N, D)."""
        out: Tensor = self.norm(tokens)
        return out

    def look(self, images: Tensor) -> Iterator[Look]:
        """All blocks in order, with the logits of their attention."""
        x, bias = self.embed(images), self._shared()
        for block in self.blocks:
            assert isinstance(block, Block)
            look = block.look(x, bias)
            x = look.output
            yield look
            del look  # one block's attention at a time

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """What enters the first block: (B, 1 + N, D)."""
        if images.shape[2:] != (self.image_size, self.image_size):
            size = f"{images.shape[2]} x {images.shape[3]}"
            raise ValueError(f"images of {size} pixels: expected {self.image_size} x {self.image_size}")
        x: Tensor = self.patch_embed(patchify(images, self.patch_size))
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("mask: this encoder was built with mask_token=False")
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed if self.absolute else x

    def _shared(self) -> Tensor | None:
        return None if self.rel_pos_bias is None else self.rel_pos_bias.bias()

    @torch.no_grad()
    def _start(self) -> None:
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(part.weight, std=STD, a=-STD, b=STD)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for token in (self.cls_token, self.mask_token, self.pos_embed if self.absolute else None):
            if token is not None:
                nn.init.trunc_normal_(token, std=STD, a=-STD, b=STD)
        for number, block in enumerate(self.blocks, 1):  # what a deep stack of residuals adds up stays of one size
            assert isinstance(block, Block)
            block.attn.proj.weight /= (2 * number) ** 0.5
            block.mlp.fc2.weight /= (2 * number) ** 0.5


build = BEiT
