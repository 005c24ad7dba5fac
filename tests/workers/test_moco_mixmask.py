"""MoCo, MixMask and Un-Mix: the parts, and real runs of the worker."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import contract.settings
from contract import rundir
from contract.settings.checks import SettingsError
from workers import main_moco_mixmask, models
from workers.engine.encoder import load_encoder
from workers.losses.moco import accuracy, against, infonce
from workers.main_moco_mixmask import MoCo, Settings
from workers.masking.mix import Draws, block_mask, discrete_mask, enlarged
from workers.models.resnet import SplitBatchNorm2d, split_norms
from workers.transforms.two_views import TwoViews, coloured, colours

TINY = {
    "worker": "main_moco_mixmask",
    "data": {"name": "fake", "size": 16, "length": 64},
    "image_size": 16,
    "epochs": 2,
    "batch_size": 8,
    "queue_size": 64,
    "projector_dim": 16,
    "grid_size": 4,
    "eval_freq": 0,
    "log_every": 2,
}
METHODS = ("moco", "mixmask", "unmix", "both")


def build(**values) -> MoCo:
    torch.manual_seed(0)
    return main_moco_mixmask.build(Settings(**{**TINY, "data": contract.settings.Data(), **values}))


def views(b: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, 2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def ended(folder: Path) -> dict[str, float]:
    return json.loads((folder / rundir.DONE).read_text())["metrics"]


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / rundir.METRICS).read_text().splitlines()]
    return [{key: value for key, value in each.items() if key != "time"} for each in found]


@pytest.mark.parametrize("size", [32, 31, 10])
def test_a_mask_has_cells_of_about_one_size_at_any_size(size):
    mask = torch.rand(5, 5) < 0.5
    large = enlarged(mask, size, size + 3)
    assert large.shape == (size, size + 3)
    for i in range(size):
        for j in range(size + 3):
            assert large[i, j] == mask[i * 5 // size, j * 5 // (size + 3)]


def test_masks_never_hide_everything_or_nothing():
    torch.manual_seed(0)
    draws = Draws()
    for _ in range(200):
        for mask in (block_mask(draws, 3, 4), block_mask(draws, 4, 1), discrete_mask(draws, 2, 0.9)):
            assert mask.any()
            assert not mask.all()
    empty = [block_mask(draws, 2, 2, redraw=False).all() for _ in range(50)]
    assert sum(empty) > 10  # as published


def test_the_kept_share_is_what_was_asked_for():
    torch.manual_seed(0)
    kept = [1 - block_mask(Draws(), 8, 32).double().mean().item() for _ in range(200)]
    assert max(kept) == 0.5
    assert sum(kept) / len(kept) == pytest.approx(0.5, abs=0.01)


def test_a_mixture_knows_where_every_guest_is():
    method = build(method="both")
    images = views()[:, 0]
    for seed in range(10):
        torch.manual_seed(seed)
        blend, mask = method.mixtures(images, Draws())
        for mixed in (blend, mask):
            assert 0 <= mixed.share <= 1
            guests = torch.empty_like(images)
            guests[mixed.guest_in] = images  # whom each picture has as a guest
            own = (mixed.images == images).all(1, keepdim=True)
            if mixed.kind == "mask" or own.any():
                torch.testing.assert_close(torch.where(own, images, guests), mixed.images)
                different = (images != guests).any(1, keepdim=True).flatten(1).any(1)
                kept = own[different].float().mean((1, 2, 3))
                assert torch.allclose(kept, torch.full_like(kept, mixed.share), atol=1e-6)
            else:
                torch.testing.assert_close(mixed.share * images + (1 - mixed.share) * guests, mixed.images)


def test_the_loss_is_a_cross_entropy_over_one_positive_and_the_queue():
    torch.manual_seed(0)
    q, k, queue = (F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1) for n in (6, 6, 20))
    order, t = torch.randperm(6), 0.2
    queued = against(q, queue, t)
    for rows in (None, order):
        turned = q if rows is None else q[rows]
        logits = torch.cat([(turned * k).sum(1, keepdim=True), turned @ queue.T], dim=1) / t
        expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
        torch.testing.assert_close(infonce(queued, k, t, rows), expected)
        if rows is None:
            for top in (1, 5):
                right = (logits.topk(top, dim=1).indices == 0).any(1).double().mean()
                assert accuracy(queued, k, t, top).item() == pytest.approx(right.item())


@pytest.mark.parametrize("method", METHODS)
def test_keys_are_never_mixed_and_fill_the_queue_in_turn(method):
    model = build(method=method, queue_size=16)
    before, batch = model.queue.clone(), views()
    found = model(batch)
    keys = model.embed(model.target_encoder, model.target_projector, batch[:, 1])  # the same statistics: one process
    torch.testing.assert_close(model.queue[:8], keys)
    assert torch.equal(model.queue[8:], before[8:])
    found["loss"].backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert all(p.grad is None for p in model.target_encoder.parameters())
    weight = 1 + sum(name.startswith("share") for name in found)
    assert found["loss"].item() == pytest.approx(weight * found["loss_clean"].item(), rel=0.5)  # one for each branch
    for _ in range(3):
        model(views(seed=1))
    assert model.place.item() == 0
    assert model.queue.norm(dim=1).allclose(torch.ones(16))


def test_the_key_network_follows_the_parameters_alone():
    model = build(target_mom=0.9)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1)
    before = {name: value.clone() for name, value in model.target_encoder.state_dict().items()}
    model.before_step(0.75)
    parameters = dict(model.encoder.named_parameters())
    for name, value in model.target_encoder.state_dict().items():
        expected = before[name].lerp(parameters[name], 0.25) if name in parameters else before[name]
        torch.testing.assert_close(value, expected)


def test_split_norms_are_as_many_norms():
    torch.manual_seed(0)
    whole, split = torch.nn.BatchNorm2d(3), SplitBatchNorm2d(3, 2)
    x = torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(split(x), torch.cat([whole(x[:4]), whole(x[4:])]))
    estimates = []
    for part in x.chunk(2):
        alone = torch.nn.BatchNorm2d(3)
        alone(part)
        estimates.append(alone.running_var)
    torch.testing.assert_close(split.running_var, torch.stack(estimates).mean(0))
    split.eval()
    whole.load_state_dict(split.state_dict())
    torch.testing.assert_close(split(x), whole.eval()(x))
    with pytest.raises(ValueError, match="a batch of 7"):
        split.train()(x[:7])


def test_one_process_shuffles_where_its_norms_are_split():
    model = build(bn_splits=2, method="moco")
    torch.manual_seed(3)
    model(views())
    order = torch.Generator().manual_seed(3)
    shuffled = torch.randperm(8, generator=order)
    again = build(bn_splits=2, method="moco")
    keys = again.embed(again.target_encoder, again.target_projector, views()[shuffled, 1])[shuffled.argsort()]
    torch.testing.assert_close(model.queue[:8], keys)


def test_a_resnet_gives_tokens_of_every_stage_and_survives_its_file(tmp_path):
    from workers.engine.encoder import save_encoder

    for arch, stem, side in (("resnet10", "imagenet", 28), ("resnet18", "cifar", 16)):
        encoder = models.build("resnet", {"arch": arch, "stem": stem, "image_size": side}).eval()
        images = torch.randn(2, 3, side, side)
        tokens = encoder.tokens(images)
        assert tokens.shape == (2, 1 + encoder.grid[0] * encoder.grid[1], encoder.width)
        torch.testing.assert_close(tokens[:, 0], encoder(images))
        torch.testing.assert_close(tokens[:, 1:].mean(1), encoder(images))
        assert encoder.tokens(images, block=0).shape[2] == 64
        torch.testing.assert_close(encoder.tokens(images, block=-1), tokens)
        with pytest.raises(ValueError, match="-4 to 3"):
            encoder.tokens(images, block=4)
        with pytest.raises(ValueError, match="no attention"):
            encoder.look(images)
        folder = tmp_path / arch
        folder.mkdir()
        save_encoder(folder, encoder, "from-a-test")
        torch.testing.assert_close(load_encoder(str(folder)).tokens(images), tokens)
    with pytest.raises(ValueError, match="arch=resnet17: unknown; choose one of resnet10, resnet18"):
        models.build("resnet", {"arch": "resnet17"})


def test_a_resnet_is_torchvisions(tmp_path):
    import torchvision

    theirs = torchvision.models.resnet18(weights=None)
    images = torch.randn(2, 3, 64, 64)
    ours = models.build("resnet", {"arch": "resnet18", "image_size": 64})
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(state)
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_splitting_norms_keeps_the_names_of_the_state():
    encoder = models.build("resnet", {"arch": "resnet10", "image_size": 16})
    names = list(encoder.state_dict())
    split_norms(encoder, 2)
    assert list(encoder.state_dict()) == names
    assert not [m for m in encoder.modules() if type(m) is torch.nn.BatchNorm2d]


@pytest.mark.parametrize("augment", ["crop", "v1", "v2"])
def test_two_views_are_two_and_depend_on_the_generator_alone(augment):
    picture = torch.randint(0, 256, (3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = colours(augment, 16)
    transform = TwoViews(16, (0.2, 1.0), 0.5, view.numbers)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        crops, u = transform(picture)
        assert crops.shape == (2, 3, 16, 16)
        found.append(coloured(view, crops[None], u[None]))
    assert torch.equal(*found)
    assert found[0].shape == (1, 2, 3, 16, 16)
    assert not torch.equal(found[0][0, 0], found[0][0, 1])
    assert 0 <= found[0].min() <= found[0].max() <= 1


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"mask_ratio": 1.5}, r"mask_ratio=1.5: must lie in \[0, 1\]"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0: of 16 cells some must be hidden and some seen; choose 0.0625 to 0.938"),
        ({"mask_ratio": 1.0, "mask_type": "discrete"}, "mask_ratio=1.0: of 16 cells"),
        ({"grid_size": 17}, "grid_size=17: with mask_type=block and image_size=16 choose 3 to 16"),
        ({"grid_size": 2}, "grid_size=2: with mask_type=block"),
        ({"unmix_prob": -0.1}, "unmix_prob=-0.1: must lie in"),
        ({"unmix_beta": 0.0}, "unmix_beta=0.0: must be above 0"),
        ({"bn_splits": 3}, "batch_size=8: expected a multiple of bn_splits=3"),
        ({"batch_size": 1}, "batch_size=1: expected a multiple of bn_splits=1, at least 2"),
        ({"arch": "resnet19"}, "arch=resnet19: unknown; did you mean resnet1"),
        ({"method": "mixup"}, "method=mixup: unknown"),
        ({"schedule": "steps", "milestones": []}, r"milestones=\[\]: schedule=steps lowers the rate at them"),
        ({"milestones": [5, 2]}, r"milestones=\[5, 2\]: expected epochs from 1 in rising order"),
        ({"temperature": 0}, "temperature=0.0: must be above 0"),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(values, line):
    with pytest.raises(SettingsError, match=line) as caught:
        contract.settings.read({**TINY, **values})
    assert "\n" not in str(caught.value)


def test_a_queue_that_batches_do_not_fill_is_refused_for_the_processes_at_hand():
    settings = contract.settings.read({**TINY, "queue_size": 40})
    settings.resolve_batch(1)
    with pytest.raises(
        SettingsError, match=r"queue_size=40: not a multiple of batch_size 8 x 2 processes = 16"
    ) as caught:
        contract.settings.read({**TINY, "queue_size": 40}).resolve_batch(2)
    assert caught.value.args[0].endswith("choose 32")


def test_the_local_batch_is_part_of_the_identity():
    def science(**values):
        settings = contract.settings.read({**TINY, **values})
        settings.resolve_batch(1)
        return settings.science()

    assert science(batch_size=8) != science(batch_size=4, accum_iter=2)
    assert science(batch_size=8) == science(batch_size=8, log_every=7)


def test_a_worker_trains_in_one_process_and_the_queue_survives_a_stop(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr("workers.engine.run._start_log", lambda: None)
    whole, stopped = (make_run(tmp_path / name, **{**TINY, "method": "both"}) for name in ("whole", "stopped"))
    (stopped / rundir.STOP).touch()

    def work(folder: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["worker", str(folder)])
        runpy.run_path(main_moco_mixmask.__file__, run_name="__main__")

    work(whole)
    work(stopped)
    assert not (stopped / rundir.DONE).exists()
    assert torch.load(stopped / rundir.CHECKPOINT, weights_only=True)["step"] == 1
    (stopped / rundir.STOP).unlink()
    work(stopped)
    assert lines(stopped) == lines(whole)
    one, other = (torch.load(f / rundir.ENCODER, weights_only=True)["state"] for f in (whole, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / rundir.FIGURES / "mixtures.png").stat().st_size > 1000
    logged = {name for line in lines(whole) for name in line}
    assert {"train/loss", "train/top1", "train/loss_mask_guest", "train/share_unmix", "train/momentum"} <= logged


def test_two_processes_train_one_network(tmp_path, make_run, work):
    values = {"method": "mixmask", "env": {"ngpu": 0, "nproc": 2}, "batch_size": 4, "augment": "v2", "epochs": 1}
    folder = make_run(tmp_path / "r", **{**TINY, **values})
    done = work(folder, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "strides" not in done.stdout + done.stderr
    assert 0 <= ended(folder)["knn/loo1"] <= 1
    saved = torch.load(folder / rundir.CHECKPOINT, weights_only=True)["model"]
    assert saved["place"].item() == 0  # 64 keys of eight steps have gone round once
    assert saved["queue"].norm(dim=1).allclose(torch.ones(64), atol=1e-5)
