"""The decoder of masked autoencoders (He et al., CVPR 2022, section 3): a narrow ViT over all patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workers.models.vit import EPS, Block, sincos, xavier


class MAEDecoder(nn.Module):
    """From the latents of the kept patches to the pixels of the hidden ones.

    ``in_dim`` is the encoder's width, ``dim`` the decoder's own. The names in the state dict are MAE's without
    ``decoder_``.
    """

    pos_embed: Tensor

    def __init__(
        self,
        in_dim: int,
        grid: tuple[int, int],
        patch_size: int,
        *,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        self.register_buffer("pos_embed", sincos(*grid, dim, "mae"))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, 0.0, 0.0, 0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = nn.Linear(dim, 3 * patch_size**2)
        xavier(self)

    def forward(self, latents: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """The hidden patches, (B, M, patch*patch*3), each flattened as (row, column, channel).

        latents (B, 1 + K, in_dim), class token first; visible (B, K) and hidden (B, M) patch indices.
        """
        tokens = self.tokens(latents, visible, hidden)[:, latents.shape[1] :]  # no pixels for what is seen
        out: Tensor = self.pred(self.norm(tokens))
        return out

    def tokens(self, latents: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """The last block's output: class token, kept patches, hidden ones, (B, 1 + K + M, dim).

        Attention does not care for the order, so the patches are not put back into their places: each carries the
        position of its own.
        """
        places = self.pos_embed[0, 1:]
        seen = self.embed(latents)
        cls, kept = seen[:, :1] + self.pos_embed[:, :1], seen[:, 1:] + places[visible]
        x = torch.cat([cls, kept, self.mask_token + places[hidden]], dim=1)
        for block in self.blocks:
            x = block(x)
        return x
