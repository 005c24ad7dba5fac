"""One vector of a picture out of a frozen encoder's tokens, without parameters (Przewięźlikowski et al., ICCV 2025).

Tokens are (B, 1 + N, D), the class token first; a central window is a part of the sqrt(N) x sqrt(N) grid of patches;
weights come from the attention of the block whose tokens these are, as logits (B, H, T, T).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-6
WINDOWS = ("1", "2", "3", "4")
PLAIN = ("cls", "gap", "both", *(f"cp{k}" for k in WINDOWS))  # read tokens only
ATTENDING = (*(f"ca{k}" for k in WINDOWS), "attn-mn", "attn-lcte", "dino")  # need logits as well
KINDS = PLAIN + ATTENDING
NEED_CLS = frozenset({"cls", "both", "attn-mn", "attn-lcte"})  # "dino" needs that of the other encoder


def pool(tokens: Tensor, kind: str, logits: Tensor | None = None) -> Tensor:
    """(B, 1 + N, D) -> (B, D), and (B, 2D) for ``both``.

    ``cls``, the class token; ``gap``, the mean of the patch tokens; ``both``, one after the other; ``cp1`` to ``cp4``,
    the mean of a central window; ``ca1`` to ``ca4``, patches weighted by what a central window of queries attends to;
    ``attn-mn`` and ``attn-lcte``, by what the class token attends to, in all heads or in the head of least entropy;
    ``dino``, by what the class token of another encoder attends to, whose ``logits`` these are.
    """
    patches = tokens[:, 1:]
    if kind == "cls":
        return tokens[:, 0]
    if kind == "gap":
        return patches.mean(1)
    if kind == "both":
        return torch.cat([tokens[:, 0], patches.mean(1)], dim=1)
    if kind.startswith("cp"):
        return patches[:, window(patches.shape[1], int(kind[2:]), patches.device)].mean(1)
    if kind not in ATTENDING:
        raise ValueError(f"pooling {kind!r}: unknown; choose one of {', '.join(KINDS)}")
    if logits is None:
        raise ValueError(f"pooling {kind!r}: needs attention logits")
    return torch.einsum("bn,bnd->bd", _weights(kind, logits.float(), patches.shape[1]).to(patches.dtype), patches)


def window(patches: int, k: int, device: torch.device | None = None) -> Tensor:
    """Which patches lie in the central ``k`` x ``k`` window: (k*k,). Up and left of the centre where it is off."""
    side = math.isqrt(patches)
    if side**2 != patches or k > side:
        raise ValueError(f"a central window of {k} x {k}: not on a square grid of {patches} patches")
    rows = side // 2 - (k + 1) // 2 + torch.arange(k, device=device)
    return (rows[:, None] * side + rows).flatten()


def _weights(kind: str, logits: Tensor, patches: int) -> Tensor:
    """(B, H, T, T) -> (B, N). Only the rows that count go through the softmax."""
    special = logits.shape[-1] - patches  # 1 with a class token, 0 without
    if kind.startswith("ca"):
        rows = special + window(patches, int(kind[2:]), logits.device)
        mean = logits[:, :, rows].softmax(-1)[..., special:].mean((1, 2))
        return mean / (mean.sum(1, keepdim=True) + EPS) / patches  # published so, the 1/N included
    row = logits[:, :, 0]  # (B, H, T)
    if kind == "dino":
        return row.softmax(-1)[..., 1:].mean(1) / patches  # published so: not renormalised
    if kind == "attn-lcte":
        log_p = row[..., 1:].log_softmax(-1)  # over the patches: right also where the class token takes nearly all
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.take_along_dim(entropy.argmin(1)[:, None, None], dim=1)[:, 0].exp()
    return row.log_softmax(-1)[..., 1:].logsumexp(1).softmax(-1)  # the mean over the heads, renormalised
