"""Fine-tuning without reference numbers, and its worker on pictures of noise."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from contract import rundir
from contract.settings import SettingsError, build
from contract.settings.main_finetune import Settings
from workers import main_finetune, models
from workers.data.fake import load as fake
from workers.data.loader import train_loader
from workers.engine import pictures
from workers.engine.distributed import fold
from workers.engine.encoder import load_encoder, save_encoder
from workers.engine.retrained import load_trainable, stretched
from workers.main_finetune import Classifier
from workers.models.vit import PRESETS, ViT
from workers.transforms.augment import InTurn, RandAugment, posterized
from workers.transforms.crops import RandomResizedCrop, ResizeCenterCrop
from workers.transforms.mixing import Draw, Mixing, erased, smoothed

VIT = {**PRESETS["vit_nano"], "depth": 2, "patch_size": 4, "grid_size": 4, "pos": "mae"}
BEIT = {"dim": 24, "depth": 2, "heads": 3, "patch_size": 4, "grid_size": 4}


def encoder(name: str = "vit", **changes: object) -> models.Encoder:
    torch.manual_seed(0)
    built = models.build(name, {**(VIT if name == "vit" else BEIT), **changes})  # type: ignore[dict-item]
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return built


@pytest.fixture
def saved(tmp_path):
    """``saved("vit", ...)``: the path of an ``encoder.pt``."""

    def save(name: str = "vit", **changes: object) -> str:
        save_encoder(tmp_path, encoder(name, **changes), "somewhere")
        return str(tmp_path / rundir.ENCODER)

    return save


def settings(**values: object) -> Settings:
    return Settings(worker="main_finetune", encoder="somewhere", **values)


@pytest.mark.parametrize("pool", ["gap", "cls"])
def test_what_is_trained_gets_a_gradient_and_nothing_else_is(pool):
    for name in ("vit", "beit"):
        model = Classifier(encoder(name), 5, pool=pool)
        torch.nn.init.normal_(model.head.weight)
        model((torch.randn(4, 3, 16, 16), torch.arange(4)))["loss"].backward()
        for key, p in model.named_parameters():
            assert p.requires_grad == (p.grad is not None), key
        frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
        norm = {"encoder.norm.weight", "encoder.norm.bias"} if pool == "gap" else set()
        assert frozen == norm | ({"encoder.mask_token"} if name == "beit" else set())


def test_every_trained_parameter_is_in_one_group_and_the_head_learns_fastest():
    model = Classifier(encoder(), 5)
    found = main_finetune.groups(model.named_parameters(), 2, settings(layer_decay=0.5))
    listed = [p for group in found for p in group["params"]]
    assert len(listed) == len(set(listed)) == sum(p.requires_grad for p in model.parameters())
    scale = {p: group["lr_scale"] for group in found for p in group["params"]}
    assert scale[model.head.weight] == 1
    assert scale[model.encoder.get_parameter("blocks.1.norm1.weight")] == 0.5
    assert scale[model.encoder.get_parameter("cls_token")] == 0.125


def test_the_classifier_begins_at_nothing():
    model = Classifier(encoder(), 8)
    loss = model((torch.randn(4, 3, 16, 16), torch.arange(4)))["loss"].item()
    assert loss == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-2)


def test_an_encoder_goes_on_learning_where_it_was(saved):
    old, images = encoder(), torch.randn(2, 3, 16, 16)
    new = load_trainable(saved(), drop_path=0.3)
    assert isinstance(new, ViT)
    assert new.training
    assert all(p.requires_grad for p in new.parameters())
    assert "pos_embed" in dict(new.named_parameters())
    assert [block.drop_path.rate for block in new.blocks] == [0.0, 0.3]
    torch.testing.assert_close(new.eval().tokens(images), old.eval().tokens(images))


def test_a_shared_table_becomes_one_in_every_block(saved):
    old, images = encoder("beit"), torch.randn(2, 3, 16, 16)
    new = load_trainable(saved("beit"), drop_path=0.2)
    torch.testing.assert_close(new.eval().tokens(images), old.eval().tokens(images))
    tables = [name for name in new.state_dict() if name.endswith("bias_table")]
    assert len(tables) == new.depth


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_positions_are_stretched_to_another_size(name, saved):
    new = load_trainable(saved(name), drop_path=0.0, input_size=24)
    assert new.tokens(torch.randn(2, 3, 24, 24)).shape == (2, 37, new.width)
    with pytest.raises(SettingsError, match=r"input_size=26.*patches of 4"):
        load_trainable(saved(name), drop_path=0.0, input_size=26)


def test_a_stretched_table_keeps_its_ends_and_the_rows_of_the_class_token():
    table = torch.randn(5 * 5 + 3, 2)
    assert stretched(table, (3, 3), (3, 3)) is table
    out = stretched(table, (3, 3), (5, 5))
    assert out.shape == (9 * 9 + 3, 2)
    assert torch.equal(out[-3:], table[-3:])
    places, before = out[:-3].view(9, 9, 2), table[:-3].view(5, 5, 2)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(places[corner], before[corner])
    torch.testing.assert_close(places[4, 4], before[2, 2])


def test_mixing_keeps_the_sum_of_the_targets_and_takes_from_the_counterpart():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 10, 8)
    targets = smoothed(torch.arange(4), 4, 0.1)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    blended, mixed = Mixing.mixed(images, targets, Draw(0.75, None))
    torch.testing.assert_close(blended[0], torch.full((3, 10, 8), 0.75))  # 0.75 x 0 + 0.25 x 3 in its place
    torch.testing.assert_close(mixed.sum(1), torch.ones(4))
    boxed, mixed = Mixing.mixed(images, targets, Draw(0.5, (0, 0)))
    share = (boxed[0] == 0).float().mean().item()
    assert 0.5 < share < 1  # cut at the corner, so less than half is another's
    torch.testing.assert_close(mixed, targets * share + targets.flip(0) * (1 - share))


def test_draws_follow_their_settings():
    torch.manual_seed(0)
    assert Mixing().draw(8, 8) is None
    assert Mixing(0.8, prob=0.0).draw(8, 8) is None
    blended = [Mixing(0.8).draw(8, 8) for _ in range(20)]
    boxed = [Mixing(0.0, 1.0).draw(8, 6) for _ in range(200)]
    assert all(each is not None and each.centre is None for each in blended)
    centres = {each.centre for each in boxed if each is not None}
    assert {centre[0] for centre in centres if centre} == set(range(8))
    assert {centre[1] for centre in centres if centre} == set(range(6))
    both = [Mixing(0.8, 1.0, switch_prob=0.25).draw(8, 8) for _ in range(400)]
    assert 0.17 < sum(each is not None and each.centre is not None for each in both) / 400 < 0.33


def test_erasing_puts_noise_into_one_box():
    torch.manual_seed(0)
    images = torch.full((200, 3, 16, 16), 9.0)
    out = erased(images, 0.25)
    changed = (out != 9).all(1)
    assert torch.equal(changed, (out != 9).any(1))
    hit = changed.flatten(1).any(1)
    assert 0.15 < hit.float().mean() < 0.35
    for each in changed[hit]:
        rows, columns = each.any(1), each.any(0)
        assert torch.equal(each, rows[:, None] & columns)
        assert each.float().mean() < 0.45
    noise = out[(out != 9)]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    assert torch.equal(erased(images, 0.0), images)


@pytest.mark.parametrize("workers", [0, 2])
def test_randaugment_depends_on_the_picture_and_nothing_else(workers):
    def epoch(number: int, loaders: int) -> Tensor:
        crop = InTurn(RandomResizedCrop(16), RandAugment("rand-m9-mstd0.5-inc1", 16, (0.5, 0.5, 0.5)))
        some = fake("train", None, length=12, size=16, classes=3)
        loader = train_loader(some, crop, 4, seed=0, rank=0, world=1, fold=fold, workers=loaders)
        loader.sampler.start(number, 0)  # type: ignore[attr-defined]
        found = {int(i): x for batch in loader for x, i in zip(batch[0], batch[2], strict=True)}
        return torch.stack([found[i] for i in sorted(found)])

    random.seed(1)
    first = epoch(0, 0)
    random.seed(2)
    assert first.dtype == torch.uint8
    assert torch.equal(epoch(0, workers), first)
    assert not torch.equal(epoch(1, workers), first)


def test_the_strongest_posterisation_leaves_nothing():
    bright = F.to_pil_image(torch.full((3, 4, 4), 200, dtype=torch.uint8))
    kept = {bits: int(F.pil_to_tensor(posterized(bright, bits)).max()) for bits in (0, 1, 4, 8)}
    assert kept == {0: 0, 1: 128, 4: 192, 8: 200}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixup": 0.8, "batch_size": 63}, r"batch_size=63.*choose an even number"),
        ({"cutmix": 1.0, "batch_size": 5}, r"batch_size=5.*choose an even number"),
        ({"aa": "rand-m9-"}, r"aa=rand-m9-.*rand-m9-mstd0.5-inc1"),
        ({"aa": "augmix"}, r"aa=augmix.*expected null, or"),
        ({"layer_decay": 0.0}, r"layer_decay=0.0.*above 0"),
        ({"reprob": 1.5}, r"reprob=1.5.*\[0, 1\]"),
        ({"drop_path": -0.1}, r"drop_path=-0.1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(values, message):
    with pytest.raises(SettingsError, match=message) as caught:
        settings(**values)
    assert "\n" not in str(caught.value)


def test_the_class_token_of_an_encoder_without_one_is_refused():
    with pytest.raises(SettingsError, match=r"pool=cls.*choose pool=gap"):
        Classifier(encoder(cls=False), 5, pool="cls")


TINY = {
    "worker": "main_finetune",
    "data": {"name": "fake", "size": 16, "length": 101, "classes": 10},
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 8,
    "accum_iter": 2,
    "log_every": 2,
    "eval_freq": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "reprob": 0.25,
    "aa": "rand-m9-mstd0.5-inc1",
    "blr": 2e-2,
}


def curve(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in rundir.read_journal(folder / rundir.METRICS)[0]]


def test_a_stopped_and_resumed_run_equals_an_unstopped_one(tmp_path, make_run, work, saved):
    said = {**TINY, "encoder": saved()}
    whole, stopped = (make_run(tmp_path / which / "r", **said) for which in ("whole", "stopped"))
    done = work(whole)
    assert done.returncode == 0, done.stderr
    (stopped / rundir.STOP).touch()  # found at the first look, in the middle of the first epoch
    assert work(stopped).returncode == 0
    assert (stopped / rundir.CHECKPOINT).exists()
    assert not (stopped / rundir.DONE).exists()
    (stopped / rundir.STOP).unlink()
    assert work(stopped).returncode == 0
    assert curve(stopped) == curve(whole)
    assert (stopped / rundir.ENCODER).read_bytes() == (whole / rundir.ENCODER).read_bytes()
    before, after = (load_encoder(each).state_dict() for each in (said["encoder"], str(whole)))
    assert not torch.equal(before["blocks.0.mlp.fc1.weight"], after["blocks.0.mlp.fc1.weight"])
    assert torch.equal(before["norm.weight"], after["norm.weight"])  # gap has a norm of its own


def test_two_processes_measure_every_picture_once(tmp_path, make_run, work, saved):
    said = {**TINY, "encoder": saved(), "epochs": 0, "warmup_epochs": 0, "accum_iter": 1}
    folder = make_run(tmp_path / "r", **said, env={"nproc": 2})
    done = work(folder, 2)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / rundir.DONE).read_text())["metrics"]

    alone = build(Settings, said)
    tuned = load_trainable(alone.encoder, drop_path=alone.drop_path)
    torch.manual_seed(fold(alone.seed))
    model = main_finetune.build(alone, tuned, alone.data.classes)
    loader = pictures.in_order(alone, pictures.load(alone, "val"), ResizeCenterCrop(16, alone.eval_crop))
    normalise = pictures.normaliser(alone, tuned)
    expected = main_finetune.evaluate(model, loader, lambda batch: (normalise(batch[0]), batch[1]))
    assert found == pytest.approx(expected, rel=1e-6)
    assert set(found) == {"finetune/top1", "finetune/top5", "finetune/loss"}
