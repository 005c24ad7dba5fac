"""What every encoder promises: tokens, looks, blocks, norms, sizes."""

from __future__ import annotations

import pytest
import torch

from workers import models
from workers.interop import published
from workers.models.timm_model import create

SIZES = {"dim": 24, "depth": 3, "heads": 2, "patch_size": 4, "grid_size": 4}
KINDS = {
    "vit": ("vit", {}),
    "vit without class token": ("vit", {"cls": False, "pos": "mae"}),
    "beit": ("beit", {}),
    "beit with own tables": ("beit", {"bias": "per_block", "absolute": True}),
    "timm": ("timm_model", {"model": "vit_tiny_patch16_224", "image_size": 32}),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def made(kind, **changes):
    torch.manual_seed(0)
    name, kwargs = KINDS[kind]
    encoder = models.build(name, {**({} if name == "timm_model" else SIZES), **kwargs, **changes}).eval()
    for parameter in encoder.parameters():  # a bias that starts at zero would hide that it is left out
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim != 4 else None
    images = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    return encoder.requires_grad_(False), images


@EACH
def test_looking_and_computing_give_the_same_tokens(kind):
    encoder, images = made(kind)
    looks = list(encoder.look(images))
    assert len(looks) == encoder.depth
    for block, look in enumerate(looks):
        tokens = encoder.tokens(images, block=block)
        assert tokens.shape == (2, 1 + encoder.grid[0] * encoder.grid[1], encoder.width)
        assert look.logits.shape == (2, encoder.heads, *[look.input.shape[1]] * 2)
        torch.testing.assert_close(look.output, tokens if encoder.has_cls else tokens[:, 1:], atol=1e-5, rtol=1e-4)
        assert look.branch.shape == look.input.shape
        assert block == 0 or torch.equal(look.input, looks[block - 1].output)


@EACH
def test_blocks_count_from_either_end_and_others_are_refused(kind):
    encoder, images = made(kind)
    depth = encoder.depth
    assert torch.equal(encoder.tokens(images), encoder.tokens(images, block=-1))
    assert torch.equal(encoder.tokens(images, block=0), encoder.tokens(images, block=-depth))
    assert not torch.equal(encoder.tokens(images, block=0), encoder.tokens(images))
    for block in (depth, -depth - 1):
        with pytest.raises(ValueError, match=f"block={block}: the encoder has blocks {-depth} to {depth - 1}"):
            encoder.tokens(images, block=block)


@EACH
def test_the_norm_comes_after_the_tokens_and_leaves_zeros_alone(kind):
    encoder, images = made(kind)
    tokens, final = encoder.tokens(images), encoder.final(encoder.tokens(images))
    assert final.shape == tokens.shape
    torch.testing.assert_close(encoder(images), final)
    assert bool(tokens[:, 0].any()) == bool(final[:, 0].any()) == encoder.has_cls


@EACH
def test_an_encoder_is_rebuilt_from_its_name_and_arguments(kind):
    encoder, images = made(kind)
    again = models.build(encoder.name, encoder.kwargs).eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.tokens(images), encoder.tokens(images))


@EACH
def test_positions_are_stretched_for_larger_pictures(kind):
    encoder, _ = made(kind)
    side = encoder.image_size + 2 * (encoder.image_size // encoder.grid[0])
    larger = published.resized(encoder, side).eval()
    assert larger.image_size == side
    assert larger.grid == (encoder.grid[0] + 2, encoder.grid[1] + 2)
    tokens = larger.tokens(torch.randn(1, 3, side, side))
    assert tokens.shape == (1, 1 + larger.grid[0] * larger.grid[1], encoder.width)
    assert published.resized(encoder, encoder.image_size) is encoder


def test_a_size_that_patches_do_not_fill_is_refused():
    encoder, _ = made("vit")
    with pytest.raises(ValueError, match="image_size=18: must be a multiple of the patch size, 4"):
        published.resized(encoder, 18)


def test_drop_path_is_the_same_in_every_block_unless_it_rises():
    encoder, _ = made("vit", drop_path=0.3)
    assert [block.drop_path.rate for block in encoder.blocks] == [0.3, 0.3, 0.3]
    encoder, _ = made("vit", drop_path=0.3, drop_path_linear=True)
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0, 0.15, 0.3])
    encoder, _ = made("beit")
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0, 0.05, 0.1])


def test_a_mask_token_hides_what_is_below_it():
    encoder, images = made("beit")
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, [0, 5]] = True
    other = images.clone()
    other[:, :, :4, :4] += 1  # the first patch
    other[:, :, 4:8, 4:8] -= 1  # the sixth
    assert torch.equal(encoder(images, mask), encoder(other, mask))
    assert not torch.equal(encoder(images), encoder(other))
    assert torch.equal(encoder(images, torch.zeros_like(mask)), encoder(images))
    plain, _ = made("beit", mask_token=False)
    with pytest.raises(ValueError, match="mask_token=False"):
        plain(images, mask)
    with pytest.raises(ValueError, match="8 x 8 pixels: expected 16 x 16"):
        plain(images[..., :8, :8])


def test_a_bias_tells_neighbours_from_others():
    encoder, images = made("beit")
    (first, *_) = encoder.look(images)
    encoder.rel_pos_bias.relative_position_bias_table.zero_()
    (plain, *_) = encoder.look(images)
    added = first.logits - plain.logits
    torch.testing.assert_close(added[0], added[1], atol=1e-4, rtol=1e-4)  # of places alone
    torch.testing.assert_close(added[0, :, 1, 2], added[0, :, 6, 7], atol=1e-4, rtol=1e-4)  # right neighbours, both


def test_a_network_without_blocks_is_one_map_of_features():
    encoder = create("resnet18", 64).eval().requires_grad_(False)
    images = torch.randn(2, 3, 64, 64)
    tokens = encoder.tokens(images)
    assert tokens.shape == (2, 1 + 4, 512)
    torch.testing.assert_close(tokens[:, 1:].mean(1), encoder.model(images), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="resnet18: its attention is not that of a plain vision transformer"):
        next(encoder.look(images))


def test_registers_are_no_patches():
    encoder = create("vit_small_patch14_reg4_dinov2", 28).eval().requires_grad_(False)
    images = torch.randn(1, 3, 28, 28)
    theirs = encoder.model.forward_features(images)
    ours = encoder.final(encoder.tokens(images))
    assert ours.shape == (1, 5, 384)
    torch.testing.assert_close(ours, torch.cat([theirs[:, :1], theirs[:, 5:]], 1))
    with pytest.raises(ValueError, match="not that of a plain vision transformer"):
        next(encoder.look(images))
