"""What attention maps say in a few numbers (Przewięźlikowski et al., "Beyond [cls]", ICCV 2025, section 3).

With a_ij the attention of token i to token j (softmax over j), 0 the class token and 1..N the patches, s_i the sum of
a_ij over the patches and p_ij = a_ij / s_i. A mean over patches is one over i = 1..N:

    cls_cls             a_00                                patch_self          mean a_ii
    cls_cls_adj         a_00 / (s_0 + eps)                  patch_self_adj      mean a_ii / (s_i + eps)
    cls_patch           (1/N) sum_j a_0j                    patch_cls           mean a_i0
    cls_pos_entropy     h_0                                 pos_pos_entropy     mean h_i
    entropy             -sum_j p_0j log p_0j                patch_entropy       the mean of the same over i
    cls_to_patches      s_0

The first eight are the published ones, where h_i = -sum_j q_ij log(q_ij + eps) of q_ij = a_ij / (s_i + eps): it goes to
zero, and the adjusted ones to 1 / eps, where a token attends to the class token alone. ``entropy`` and
``patch_entropy`` do not: they come from the logits of the patches. All in nats, at most log N.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
MAPS = 12  # looked at together on a CPU
PUBLISHED = (
    "cls_cls",
    "patch_self",
    "cls_cls_adj",
    "patch_self_adj",
    "cls_patch",
    "patch_cls",
    "cls_pos_entropy",
    "pos_pos_entropy",
)
WITH_CLS = (*PUBLISHED, "entropy", "patch_entropy", "cls_to_patches")
WITHOUT_CLS = ("patch_self", "patch_self_adj", "pos_pos_entropy", "patch_entropy")


def names(cls: bool) -> tuple[str, ...]:
    """What ``statistics`` gives, in its order; without a class token there are those of the patches only."""
    return WITH_CLS if cls else WITHOUT_CLS


def magnitude_names(cls: bool) -> tuple[str, ...]:
    """What ``magnitudes`` gives, in its order."""
    return ("cls_magnitude", "patch_magnitude") if cls else ("patch_magnitude",)


def statistics(logits: Tensor, cls: bool = True) -> Tensor:
    """(B, H, T, T) before the softmax -> (B, H, S), in the order of ``names``. float32 whatever the logits are.

    On a CPU a few maps at a time, so that what is read several times stays in the cache.
    """
    size = max(1, MAPS // logits.shape[1] if logits.device.type == "cpu" else len(logits))
    return torch.cat([_means(per_token(each, cls), cls) for each in torch.split(logits, size)])


@torch.no_grad()
def per_token(logits: Tensor, cls: bool = True) -> dict[str, Tensor]:
    """(B, H, T, T) before the softmax -> of every token, each (B, H, T): ``diagonal`` a_ii, ``adjusted`` a_ii / (s_i +
    eps), ``pos_entropy`` h_i, ``entropy``; with a class token also ``cls_row`` a_0j, ``cls_column`` a_i0 and
    ``to_patches`` s_i."""
    first = 1 if cls else 0
    patches = logits[..., first:].float()
    top = patches.amax(-1)
    below = patches - top[..., None]  # (B, H, T, N), every log p_ij but for a constant of the row
    weights = below.exp()
    total = weights.sum(-1)
    entropy = total.log() - below.mul_(weights).sum(-1) / total
    found = {"entropy": entropy}

    own = weights.diagonal(-first, dim1=-2, dim2=-1) / total[..., first:]  # p_ii
    sums = torch.ones_like(total)
    if cls:
        ahead = top + total.log() - logits[..., 0].float()  # log of s_i / a_i0
        sums, column = ahead.sigmoid(), (-ahead).sigmoid()
        row = weights[..., 0, :] * (sums / total)[..., :1]
        found |= {"cls_row": torch.cat([column[..., :1], row], -1), "cls_column": column, "to_patches": sums}
    found["diagonal"] = own * sums[..., first:]
    if cls:
        found["diagonal"] = torch.cat([column[..., :1], found["diagonal"]], -1)
    found["adjusted"] = found["diagonal"] / (sums + EPS)

    q = weights.mul_((sums / (total * (sums + EPS)))[..., None])
    logs = torch.add(q, EPS, out=below).log_()
    found["pos_entropy"] = -logs.mul_(q).sum(-1)
    return found


def _means(found: dict[str, Tensor], cls: bool) -> Tensor:
    """``per_token`` -> (B, H, S)"""
    first = 1 if cls else 0
    patch = {name: each[..., first:].mean(-1) for name, each in found.items()}
    means = {
        "patch_self": patch["diagonal"],
        "patch_self_adj": patch["adjusted"],
        "pos_pos_entropy": patch["pos_entropy"],
        "patch_entropy": patch["entropy"],
    }
    if cls:
        own = {name: each[..., 0] for name, each in found.items()}
        means |= {
            "cls_cls": own["diagonal"],
            "cls_cls_adj": own["adjusted"],
            "cls_patch": patch["cls_row"],
            "patch_cls": patch["cls_column"],
            "cls_pos_entropy": own["pos_entropy"],
            "entropy": own["entropy"],
            "cls_to_patches": own["to_patches"],
        }
    return torch.stack([means[name] for name in names(cls)], -1)


def magnitudes(tokens: Tensor, branch: Tensor, cls: bool = True) -> Tensor:
    """How much attention adds: ||y_i|| / (||x_i|| + eps) of a block's input tokens x and its attention branch y, after
    the projection and before anything scales it, both (B, T, D) -> (B, 2) of the class token and, as a mean, of the
    patches; (B, 1) without a class token."""
    ratio: Tensor = branch.float().norm(dim=-1) / (tokens.float().norm(dim=-1) + EPS)
    if not cls:
        return ratio.mean(1, keepdim=True)
    return torch.stack([ratio[:, 0], ratio[:, 1:].mean(1)], 1)


def saliency(logits: Tensor, cls: bool = True) -> Tensor:
    """Where a picture is looked at: (B, H, T, T) -> (B, H, N), each adding up to 1: what the class token gives to each
    patch; without one what the patches give to it, on average."""
    if cls:
        return logits[:, :, 0, 1:].float().softmax(-1)
    return logits.float().softmax(-1).mean(2)
