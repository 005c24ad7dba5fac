"""The vision transformer: its patches, positions and regularisers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from workers import models
from workers.masking.patches import patchify, take, unpatchify
from workers.models.cross_decoder import CrossDecoder
from workers.models.vit import DropPath, ViT, sincos

SIZES = {"dim": 24, "depth": 2, "heads": 2, "patch_size": 4, "grid_size": 3, "grid_columns": 5}


def vit(**changes):
    torch.manual_seed(0)
    return ViT(**{**SIZES, **changes})


def test_the_patch_embedding_is_a_convolution():
    encoder, images = vit(), torch.randn(2, 3, 12, 20)
    found = encoder.patch_embed(encoder.patchify(images))
    torch.testing.assert_close(found, encoder.patch_embed.proj(images).flatten(2).transpose(1, 2))


def test_windows_lie_where_the_jitter_says():
    images = torch.arange(2 * 3 * 10 * 15).view(2, 3, 10, 15)
    rows, columns = torch.randint(3, (2, 2, 2, 3))
    patches = patchify(images, 3, 2, (rows, columns)).view(2, 2, 3, 3, 3, 3)
    for b in range(2):
        for r in range(2):
            for q in range(3):
                top, left = 5 * r + int(rows[b, r, q]), 5 * q + int(columns[b, r, q])
                window = images[b, :, top : top + 3, left : left + 3]
                assert torch.equal(patches[b, r, q], window.permute(1, 2, 0))
    with pytest.raises(ValueError, match=r"10 x 15.*cell"):
        patchify(images, 4)


def test_unpatchify_undoes_patchify():
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, rows=2), images)


@pytest.mark.parametrize("kind", ["lmim", "mae"])
def test_positions_are_right_on_grids_that_are_not_square(kind):
    rows, columns, dim = 3, 5, 8
    table = sincos(rows, columns, dim, kind)
    assert table.shape == (1, 1 + rows * columns, dim)
    assert not table[0, 0].any()
    stretch = {"lmim": lambda i, n: n * i / (n - 1), "mae": lambda i, n: i}[kind]
    for r in range(rows):
        for q in range(columns):
            u, v = stretch(q, columns), stretch(r, rows)
            w = [10000 ** (-4 * k / dim) for k in range(dim // 4)]
            expected = [f(x * each) for x in (u, v) for f in (math.sin, math.cos) for each in w]
            torch.testing.assert_close(table[0, 1 + r * columns + q], torch.tensor(expected), atol=1e-5, rtol=0)
    assert torch.isfinite(sincos(1, 4, 8)).all()
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos(2, 2, 6)


def test_seeing_all_patches_by_their_indices_is_seeing_the_picture():
    encoder, images = vit(), torch.randn(2, 3, 12, 20)
    order = torch.rand(2, 15).argsort(1)
    whole, chosen = encoder(images), encoder(images, order)
    assert whole.shape == (2, 16, 24)
    torch.testing.assert_close(chosen[:, 1:], take(whole[:, 1:], order), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder(take(encoder.patchify(images), order), order), chosen)


def test_hidden_patches_do_not_reach_the_output():
    encoder, images = vit(), torch.randn(1, 3, 12, 20)
    other = images.clone()
    other[..., 4:] += 1  # all but the first column of patches
    ids = torch.tensor([[0, 5, 10]])
    assert torch.equal(encoder(images, ids), encoder(other, ids))


def test_tokens_are_the_last_blocks_before_the_norm():
    encoder, images = vit().eval(), torch.randn(2, 3, 12, 20)
    torch.testing.assert_close(encoder.norm(encoder.tokens(images)), encoder(images))


def test_attention_is_softmax_attention():
    attention, x = vit().blocks[0].attn, torch.randn(2, 7, 24)
    q, k, v = attention.qkv(x).view(2, 7, 3, 2, 12).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / 12**0.5).softmax(-1)
    torch.testing.assert_close(attention(x), attention.proj((weights @ v).transpose(1, 2).reshape(2, 7, 24)))


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    out = drop(x)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out.amax((1, 2)), out.amin((1, 2)))  # whole samples
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x


@pytest.mark.parametrize("rate", ["drop", "attn_drop", "drop_path"])
def test_every_regulariser_acts_in_training_only(rate):
    encoder, images = vit(**{rate: 0.5}), torch.randn(8, 3, 12, 20)
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


def test_an_encoder_is_rebuilt_from_its_name_and_arguments():
    encoder = models.build("vit", SIZES)
    again = models.build(encoder.name, encoder.kwargs)
    again.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 12, 20)
    assert torch.equal(encoder.tokens(images), again.tokens(images))
    with pytest.raises(ValueError, match=r"'vita'.*vit"):
        models.build("vita", {})


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of heads=5"):
        vit(heads=5)
    with pytest.raises(ValueError, match="16 x 20 pixels: expected 12 x 20"):
        vit()(torch.randn(1, 3, 16, 20))


def test_cues_are_means_of_what_is_seen_weighted_by_position():
    seen, here, there = torch.randn(2, 4, 16), torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    weights = (here @ there.transpose(1, 2) / 4).softmax(-1)
    torch.testing.assert_close(CrossDecoder.cues(seen, here, there), weights @ seen)


def test_a_prediction_follows_its_patch():
    torch.manual_seed(0)
    decoder = CrossDecoder(24, (4, 4), dim=16, depth=2, heads=2)
    torch.nn.init.normal_(decoder.mask_token)
    latents, order = torch.randn(2, 6, 24), torch.rand(2, 16).argsort(1)
    visible, hidden = order[:, :5], order[:, 5:]
    out = decoder(latents, visible, hidden)
    assert out.shape == (2, 11, 24)
    torch.testing.assert_close(decoder(latents, visible, hidden.flip(1)), out.flip(1), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(out[:, 0], out[:, 1])


def test_weights_start_xavier_uniform_and_biases_zero():
    encoder = vit(dim=96, depth=1)
    for weight in (encoder.blocks[0].attn.qkv.weight, encoder.patch_embed.proj.weight):
        fan_out, fan_in = weight.flatten(1).shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.98 * bound < weight.abs().max().item() <= bound
    assert not encoder.blocks[0].attn.qkv.bias.any()
    assert F.mse_loss(encoder.cls_token, torch.zeros(1, 1, 96)).sqrt().item() == pytest.approx(0.02, rel=0.3)
