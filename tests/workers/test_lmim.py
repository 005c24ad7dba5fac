"""Latent MIM without reference numbers: what must hold for any weights and draws."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.settings import SettingsError
from contract.settings.main_lmim import BLOCKS, Projector, Settings
from workers import main_lmim
from workers.losses.patch import infonce_patches, pairwise_similarity
from workers.main_lmim import LatentMIM
from workers.masking.patches import take
from workers.models.vit import PRESETS

SMALL = {"patch_size": 2, "grid_size": 4, "num_vis": 5, "decoder_dim": 16, "decoder_heads": 2, "decoder_depth": 1}


def settings(**values: object) -> Settings:
    return Settings(worker="main_lmim", **{"lr": 1e-3, "proj": Projector(mlp_dim=24), **SMALL, **values})


def method(**values: object) -> LatentMIM:
    torch.manual_seed(0)
    return main_lmim.build(settings(**values))


def images(model: LatentMIM, batch: int = 3) -> Tensor:
    side = model.encoder.grid[0] * (model.encoder.patch_size + model.patch_gap)
    return torch.randn(batch, 3, side, side)


def perturb(model: LatentMIM) -> None:
    """Weights of the target unlike the online ones, and no zero that hides a path."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_every_patch_is_either_visible_or_hidden():
    model, seen = method(), {}
    model.encoder.register_forward_hook(lambda _m, inputs, _o: seen.__setitem__("visible", inputs[1]))
    model.target_encoder.register_forward_hook(lambda _m, inputs, _o: seen.__setitem__("hidden", inputs[1]))
    model(images(model))
    assert seen["visible"].shape == (3, 5)
    every = torch.cat([seen["visible"], seen["hidden"]], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(16).expand(3, -1))
    assert len({tuple(row.tolist()) for row in seen["visible"].sort(dim=1).values}) > 1


def test_the_target_may_see_everything_and_still_gives_the_hidden_patches():
    model = method(mask_target=False)
    x = torch.randn(2, 16, 12)
    order = torch.rand(2, 16).argsort(1)
    latents = model.target(x, order[:, :5], order[:, 5:])
    whole = model.target_projector(model.target_encoder(x, torch.arange(16).expand(2, -1)))[:, 1:]
    torch.testing.assert_close(latents, take(whole, order[:, 5:]))


def test_only_the_online_branch_learns():
    model = method()
    perturb(model)
    out = model(images(model))
    out["loss"].backward()
    for name, p in model.named_parameters():
        if name.startswith("target_"):
            assert not p.requires_grad
            assert p.grad is None
        else:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0 or "kv" in name or name.endswith("qkv.bias"), name
    assert not any(value.requires_grad for name, value in out.items() if name != "loss")


def test_the_target_is_the_moving_average_of_the_online_branch():
    model = method()
    perturb(model)
    before = copy.deepcopy(model.state_dict())
    model.before_step(momentum=0.9, sim_target=0.4)
    assert model.sim_target == 0.4
    for name, value in model.state_dict().items():
        if name.startswith("target_") and not name.endswith("pos_embed"):
            expected = 0.9 * before[name] + 0.1 * before[name.removeprefix("target_")]
            torch.testing.assert_close(value, expected)
        else:
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_first_average_of_a_new_model_changes_nothing(depth):
    model = method(proj=Projector(mlp_dim=8, mlp_depth=depth))
    before = copy.deepcopy(model.state_dict())
    model.before_step(momentum=0.5, sim_target=0.5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_learned_positions_are_averaged_too():
    model = method(freeze_pe=False)
    assert model.encoder.pos_embed.requires_grad
    assert model.decoder.pos_embed.requires_grad
    perturb(model)
    model.before_step(momentum=0.0, sim_target=0.5)
    assert torch.equal(model.target_encoder.pos_embed, model.encoder.pos_embed)


@pytest.mark.parametrize("gap", [1, 3])
def test_patches_reach_every_place_in_their_cell(gap):
    model = method(patch_gap=gap)
    jitter = model.draw(torch.empty(200, 3, 1, 1)).jitter
    assert jitter is not None
    for offsets in jitter:
        assert offsets.shape == (200, 4, 4)
        assert offsets.unique().tolist() == list(range(gap + 1))
    assert torch.isfinite(model(images(model))["loss"])


def test_the_regulariser_draws_the_similarity_to_its_target():
    model = method(avg_sim_coeff=0.0)
    x = images(model)
    draws = model.draw(x)
    plain = model(x, draws)
    model.avg_sim_coeff, model.sim_target = 0.5, 0.1
    off = (plain["avg_sim_pred"] - 0.1) ** 2 + (plain["avg_sim_vis"] - 0.1) ** 2
    torch.testing.assert_close(model(x, draws)["loss"], plain["loss"] + 0.5 * off)


def test_a_pair_of_hidden_patches_is_the_least():
    assert torch.isfinite(method(num_vis=14)(torch.randn(2, 3, 8, 8))["loss"])
    for wrong in (15, 16):
        with pytest.raises(SettingsError, match=rf"num_vis={wrong}.*choose 1 to 14"):
            settings(num_vis=wrong)
    model = method()
    with pytest.raises(ValueError, match="num_vis=15"):
        LatentMIM(model.encoder, model.decoder, num_vis=15)


def test_a_target_of_another_depth_is_refused():
    assert {name: preset["depth"] for name, preset in PRESETS.items()} == BLOCKS
    settings(encoder="vit_nano", target_depth=4)
    with pytest.raises(SettingsError, match=r"target_depth=12.*choose 4 or null"):
        settings(encoder="vit_nano", target_depth=12)


def test_a_constant_channel_gives_no_nan():
    prediction = torch.randn(2, 6, 4)
    prediction[..., 0] = 1.5
    prediction.requires_grad_()
    infonce_patches(prediction, torch.randn(2, 6, 4)).backward()
    assert prediction.grad is not None
    assert torch.isfinite(prediction.grad).all()


def test_mean_similarity_equals_the_mean_of_the_table():
    a, b = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    table = torch.nn.functional.cosine_similarity(a[:, :, None], b[:, None], dim=-1)
    torch.testing.assert_close(pairwise_similarity(a, b), table.mean())


def test_decaying_matrices_leaves_tokens_positions_and_vectors_alone():
    model = method(freeze_pe=False)
    names = {id(p): name for name, p in model.named_parameters()}
    plain, decayed = main_lmim.groups(model, settings(decay_groups="matrices", weight_decay=0.3))
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    free = {names[id(p)] for p in plain["params"]}
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.pos_embed"} <= free
    assert not {"encoder.patch_embed.proj.weight", "decoder.embed.weight"} & free
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(plain["params"]) + len(decayed["params"]) == trained


def test_a_few_steps_on_one_batch_lower_the_loss():
    model = method()
    x = images(model, 8)
    draws = model.draw(x)
    optimizer = torch.optim.AdamW(main_lmim.groups(model, settings()), lr=3e-3)
    losses = []
    for _ in range(15):
        model.before_step(0.9, 0.5)
        loss = model(x, draws)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_changes_the_loss_little(dtype):
    model = method(patch_gap=1)
    x = images(model)
    draws = model.draw(x)
    full = model(x, draws)["loss"]
    with torch.autocast("cpu", dtype):
        low = model(x, draws)["loss"]
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.03, atol=0.03)


def test_pictures_fit_the_model_in_training_and_evaluation():
    s = settings(patch_gap=1, min_crop=0.5, eval_crop=0.5)
    picture = torch.randint(256, (3, 40, 30), dtype=torch.uint8)
    assert main_lmim.transform(s)(picture).shape == (3, 12, 12)
    assert main_lmim.eval_transform(s)(picture).shape == (3, 8, 8)


def test_the_similarity_maps_are_drawn(tmp_path: Path):
    model = method().eval()
    main_lmim.draw(model, torch.randn(3, 3, 8, 8), tmp_path)
    assert (tmp_path / "patch_similarity.png").stat().st_size > 10_000
