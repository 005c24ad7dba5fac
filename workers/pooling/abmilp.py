"""Attention-based multiple-instance pooling (Ilse et al., ICML 2018), as a selective aggregation of the tokens of a
frozen encoder (Przewięźlikowski et al., ICCV 2025, section 5)."""

from __future__ import annotations

import itertools
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Act = Literal["tanh", "relu"]
SelfAttention = Literal["none", "map", "both"]
Content = Literal["all", "patch"]


class OneHead(nn.Module):
    """Self-attention with a single head, no residual and no norm: (B, n, D) -> (B, n, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return out


class AbMILP(nn.Module):
    """A weighted mean of tokens, whose weights a small network gives: (B, 1 + N, D) -> (B, D).

    ``content`` says whether the class token takes part; ``depth`` counts the scorer's linear layers, with ``act``
    between them. Self-attention comes before the scorer only (``sa="map"``), or before the scorer and the mean
    (``"both"``). ``positions`` (1, 1 + N, D), a fixed table, is added to what the scorer sees. The names of the
    parameters are the published ones.
    """

    pos_embed: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        act: Act = "relu",
        depth: int = 1,
        sa: SelfAttention = "none",
        content: Content = "patch",
        positions: Tensor | None = None,
    ):
        super().__init__()
        self.first, self.sa = (1 if content == "patch" else 0), sa
        if sa != "none":
            self.self_attn = OneHead(dim)
        activation = nn.Tanh if act == "tanh" else nn.ReLU
        hidden = itertools.chain.from_iterable((nn.Linear(dim, dim), activation()) for _ in range(depth - 1))
        self.attention_predictor = nn.Sequential(*hidden, nn.Linear(dim, 1))
        table = None if positions is None else positions[:, self.first :].clone()
        self.register_buffer("pos_embed", table, persistent=False)  # a buffer: never trained

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weigh(tokens)[0]

    def weigh(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted mean (B, D), and the weights (B, n, 1) of the n tokens that take part."""
        x = tokens[:, self.first :]
        mixed = x if self.sa == "none" else self.self_attn(x)
        scored = mixed if self.pos_embed is None else mixed + self.pos_embed
        weights = self.attention_predictor(scored).float().softmax(dim=1)
        values = mixed if self.sa == "both" else x
        return (weights * values).sum(1), weights
