"""The cross-attention decoder of Latent MIM (Wei, Gupta, Morgado; ECCV 2024) and its projector."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.models.vit import EPS, Attention, DropPath, Mlp, sincos, xavier


def projector(dim: int, hidden: int, depth: int) -> nn.Sequential:
    """``depth`` linear layers without bias, dim -> hidden -> ... -> dim, each followed by a LayerNorm and all but the
    last by a GELU. With depth 0 the identity."""
    widths = [dim] + [hidden] * (depth - 1) + [dim]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), nn.LayerNorm(after), nn.GELU()]
    head = nn.Sequential(*layers[:-1] if depth else [])
    xavier(head)
    return head


class CrossAttention(nn.Module):
    """Multi-head attention of one set of tokens to another."""

    def __init__(self, dim: int, heads: int, drop: float = 0.0, attn_drop: float = 0.0):
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, D), (B, K, D) -> (B, N, D)"""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (z.transpose(1, 2) for z in self.kv_proj(context).unflatten(-1, (2, self.heads, -1)).unbind(2))
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        x = self.drop(self.proj(x.transpose(1, 2).flatten(2)))
        return x


class CrossBlock(nn.Module):
    """Self-attention among the queries, cross-attention to the context, MLP; all pre-norm."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop: float, attn_drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.self_attn = Attention(dim, heads, drop, attn_drop)
        self.norm2q = nn.LayerNorm(dim, eps=EPS)
        self.norm2kv = nn.LayerNorm(dim, eps=EPS)
        self.cross_attn = CrossAttention(dim, heads, drop, attn_drop)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, D), (B, K, D) -> (B, N, D)"""
        x = x + self.drop_path(self.self_attn(self.norm1(x)))
        x = x + self.drop_path(self.cross_attn(self.norm2q(x), self.norm2kv(context)))
        x = x + self.drop_path(self.mlp(self.norm3(x)))
        return x


class CrossDecoder(nn.Module):
    """From the latents of the visible patches to those of the hidden ones.

    Each hidden patch starts as a mask token, to which its visual cue may be added, and reads the visible tokens by
    cross-attention in every block. ``in_dim`` is the encoder's width, ``dim`` the decoder's own.
    """

    pos_embed: Tensor

    def __init__(
        self,
        in_dim: int,
        grid: tuple[int, int],
        *,
        dim: int = 512,
        depth: int = 3,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        cues: bool = True,
        learn_pos: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.with_cues = cues
        self.embed = nn.Linear(in_dim, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        if learn_pos:
            self.pos_embed = nn.Parameter(sincos(*grid, dim))
        else:
            self.register_buffer("pos_embed", sincos(*grid, dim))
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, mlp_ratio, drop, attn_drop, drop_path) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, in_dim)
        xavier(self)

    def forward(self, latents: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predicted latents of the hidden patches.

        latents (B, 1 + V, in_dim), class token first; visible (B, V) and hidden (B, M) patch indices -> (B, M, in_dim).
        """
        context = self.embed(latents)
        here, there = self.pos_embed[0, 1:][hidden], self.pos_embed[0, 1:][visible]
        masks = self.mask_token + here
        if self.with_cues:
            masks = masks + self.cues(context[:, 1:], here, there)
        cls = self.pos_embed[:, :1]
        x = torch.cat([(self.cls_token + cls).expand(len(masks), -1, -1), masks], dim=1)
        context = context + torch.cat([cls.expand(len(there), -1, -1), there], dim=1)
        for block in self.blocks:
            x = block(x, context)
        out: Tensor = self.head(self.norm(x)[:, 1:])
        return out

    @staticmethod
    def cues(seen: Tensor, here: Tensor, there: Tensor) -> Tensor:
        """The mean of the visible tokens, weighted by closeness: softmax_j(<here_i, there_j> / sqrt(D)) seen_j.

        seen (B, V, D); positions here (B, M, D) of the hidden and there (B, V, D) of the visible patches -> (B, M, D).
        """
        return F.scaled_dot_product_attention(here[:, None], there[:, None], seen[:, None])[:, 0]
