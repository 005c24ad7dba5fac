"""Any network of timm (Wightman, 2019) behind the face of our encoders."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.models import Encoder, Look


class TimmModel(Encoder):
    """``network`` is timm's module without its classifier.

    A vision transformer gives the outputs of its blocks, the tokens beside class and patches (registers) left out. Any
    other network is one block, whose output is its last feature map.
    """

    grid: tuple[int, int]
    model: Any
    any_size = False  # timm's constructor knows no size of pictures

    def __init__(self, network: Any, image_size: int):
        super().__init__()
        self.model, self.image_size, self.width = network, image_size, int(network.num_features)
        blocks = getattr(network, "blocks", None)
        self.is_vit = isinstance(blocks, nn.ModuleList | nn.Sequential) and hasattr(network, "num_prefix_tokens")
        if self.is_vit:
            (rows, columns), self.prefix = network.patch_embed.grid_size, int(network.num_prefix_tokens)
            self.has_cls = getattr(network, "cls_token", None) is not None
            self.depth, self.heads = len(network.blocks), int(getattr(network.blocks[0].attn, "num_heads", 1))
        else:
            self.has_cls, self.prefix, self.depth, self.heads = False, 0, 1, 1
            with torch.no_grad():
                network.eval()  # batch norms refuse to train on one picture
                rows, columns = self._map(torch.zeros(1, 3, image_size, image_size)).shape[2:]
                network.train()
        self.grid = (int(rows), int(columns))

    def forward(self, images: Tensor) -> Tensor:
        """``tokens`` after the final norm."""
        return self.final(self.tokens(images))

    def tokens(self, images: Tensor, *, block: int | None = None) -> Tensor:
        """The output of ``block`` (None: the last), class token or zeros first: (B, 1 + N, D)."""
        run = self.through(block)
        if not self.is_vit:
            return F.pad(self._map(images).flatten(2).transpose(1, 2), (0, 0, 1, 0))
        found = self.model.forward_intermediates(
            images, [run - 1], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True,
            return_prefix_tokens=True,
        )  # fmt: skip
        patches, prefix = found[0] if isinstance(found[0], tuple) else (found[0], None)
        if self.has_cls:
            return torch.cat([prefix[:, :1], patches], dim=1)
        return F.pad(patches, (0, 0, 1, 0))

    def final(self, tokens: Tensor) -> Tensor:
        """The last norm over tokens: (B, 1 + N, D) -> (B, 1 + N, D)."""
        norms = [getattr(self.model, name, None) for name in ("norm", "fc_norm")] if self.is_vit else []
        norm = next((n for n in norms if n is not None and not isinstance(n, nn.Identity)), nn.Identity())
        out: Tensor = norm(tokens)
        return out if self.has_cls else F.pad(out[:, 1:], (0, 0, 1, 0))

    def look(self, images: Tensor) -> Iterator[Look]:
        """All blocks in order. Raises ValueError where there is no plain attention of class and patches to look at."""
        if not self.is_vit or type(self.model).__name__ != "VisionTransformer" or self.prefix != int(self.has_cls):
            raise ValueError(f"{self.kwargs['model']}: its attention is not that of a plain vision transformer")
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for block in model.blocks:
            seen: list[Tensor] = []
            hook = block.attn.register_forward_hook(lambda _, given, out, seen=seen: seen.extend((given[0], out)))
            try:
                after = block(x)
            finally:
                hook.remove()
            yield Look(x, logits(block.attn, seen[0]), seen[1], after)
            x = after

    def _map(self, images: Tensor) -> Tensor:
        """The last feature map, (B, D, h, w)."""
        x: Tensor = self.model.forward_features(images)
        if x.ndim == 3:  # tokens, of a transformer without blocks as we know them
            return x.transpose(1, 2)[..., None]
        return x.permute(0, 3, 1, 2) if x.shape[1] != self.width and x.shape[-1] == self.width else x


def logits(attention: Any, x: Tensor) -> Tensor:
    """Of timm's attention module for its input (B, T, D): (B, H, T, T)."""
    qkv = attention.qkv(x).reshape(*x.shape[:2], 3, attention.num_heads, -1)
    q, k = (z.transpose(1, 2) for z in itertools.islice(qkv.unbind(2), 2))
    q, k = attention.q_norm(q), attention.k_norm(k)
    found: Tensor = (q * attention.scale) @ k.transpose(-2, -1)
    return found


def create(model: str, image_size: int | None = None, **options: Any) -> TimmModel:
    """A network by timm's name, for pictures of ``image_size`` (None: its own). Raises ValueError, listing names."""
    if not timm.is_model(model):
        close = ", ".join(difflib.get_close_matches(model, timm.list_models(), n=5))
        raise ValueError(f"timm {timm.__version__} has no network {model}{close and '; it has '}{close}")
    own = timm.get_pretrained_cfg(model)
    size = int(image_size or (own.input_size[-1] if own else 224))
    network: Any
    taken = True
    sized: dict[str, Any] = {"img_size": size} if image_size else {}
    try:
        network = timm.create_model(model, num_classes=0, **options, **sized)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        network, taken = timm.create_model(model, num_classes=0, **options), False
    built = TimmModel(network, size)
    built.any_size = not taken
    built.name, built.kwargs = "timm_model", {"model": model, "image_size": size}
    cfg = network.pretrained_cfg
    if cfg.get("mean"):
        (r, g, b), (sr, sg, sb) = cfg["mean"], cfg["std"]
        built.mean, built.std = (r, g, b), (sr, sg, sb)
    return built


def build(model: str, image_size: int) -> TimmModel:
    """A freshly initialised one."""
    return create(model, image_size)
