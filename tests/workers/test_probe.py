"""Features, neighbours, the linear probe and its optimizer, against slow versions written for the reader."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from contract import rundir
from workers.engine import probe
from workers.engine.encoder import EncoderError, load_encoder
from workers.engine.optim import LARS, cosine, warmup_cosine
from workers.transforms.crops import RandomResizedCrop, ResizeCenterCrop


def cosine_of(a, b) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_leave_one_out_is_the_nearest_other_picture(monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", 7)
    x, y = torch.randn(23, 5), torch.randint(0, 3, (23,))
    hits = 0
    for i in range(23):
        _, nearest = max((cosine_of(x[i], x[j]), j) for j in range(23) if j != i)
        hits += int(y[nearest] == y[i])
    assert probe.leave_one_out(x, y) == hits / 23


def test_weighted_votes_count_the_k_nearest_of_the_bank(monkeypatch):
    monkeypatch.setattr(probe, "CHUNK", 4)
    bank, labels, query, truth = (
        torch.randn(20, 6),
        torch.randint(0, 4, (20,)),
        torch.randn(9, 6),
        torch.randint(0, 4, (9,)),
    )
    for k in (1, 5, 50):
        hits = 0
        for q, right in zip(query, truth, strict=True):
            near = sorted(((cosine_of(q, b), int(c)) for b, c in zip(bank, labels, strict=True)), reverse=True)[:k]
            votes = [sum(math.exp(s / 0.07) for s, c in near if c == each) for each in range(4)]
            hits += int(votes.index(max(votes)) == int(right))
        found = probe.weighted_knn(bank, labels, query, truth, k=[k, 1], temperature=0.07, classes=4)
        assert found[k] == hits / 9


def test_lars_scales_matrices_and_leaves_vectors():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
    optimizer = LARS([matrix, vector], lr=0.5, weight_decay=0.1)
    momenta = [torch.zeros(3, 4), torch.zeros(4)]
    expected = [matrix.detach().clone(), vector.detach().clone()]
    for _ in range(3):
        grads = [torch.randn(3, 4), torch.randn(4)]
        for p, g in zip((matrix, vector), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        update = grads[0] + 0.1 * expected[0]
        update = update * 0.001 * expected[0].norm() / update.norm()
        for i, step in enumerate((update, grads[1])):
            momenta[i] = 0.9 * momenta[i] + step
            expected[i] = expected[i] - 0.5 * momenta[i]
    torch.testing.assert_close(matrix.detach(), expected[0])
    torch.testing.assert_close(vector.detach(), expected[1])


def test_lars_moves_a_weight_of_zeros():
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([weight], lr=1.0)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(weight.detach(), -torch.ones(2, 2))


def test_schedules_start_peak_and_end_where_they_say():
    assert cosine(0, 0.9, 1.0) == pytest.approx(0.9)
    assert cosine(1, 0.9, 1.0) == pytest.approx(1.0)
    rates = [warmup_cosine(t / 10, peak=2.0, warmup=0.2, floor=0.5, start=0.1) for t in range(11)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[2] == pytest.approx(2.0)
    assert rates[10] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_crops_stay_inside_and_have_the_asked_area():
    crop = RandomResizedCrop(8, scale=(0.2, 0.5), hflip=0.0)
    for _ in range(300):
        top, left, height, width = crop.box(30, 50)
        assert top >= 0 and left >= 0 and top + height <= 30 and left + width <= 50
        assert 0.15 < height * width / 1500 < 0.55


def test_a_crop_of_everything_is_a_resize_and_flips_mirror_it():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    whole = RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    assert torch.equal(whole(image), image)
    flipped = RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=1.0)
    assert torch.equal(flipped(image), image.flip(-1))


@pytest.mark.parametrize("shape", [(28, 28), (20, 60), (60, 20), (5, 7)])
def test_evaluation_pictures_have_the_size_of_the_encoder(shape):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    assert ResizeCenterCrop(28, 0.875)(image).shape == (3, 28, 28)
    assert ResizeCenterCrop(28, 1.0)(image).shape == (3, 28, 28)


def test_evaluations_read_what_pretraining_wrote(tmp_path, make_run, work, tiny):
    pretrained = make_run(tmp_path / "main_lmim" / "aaa", **{**tiny, "epochs": 0})
    assert work(pretrained).returncode == 0
    data = tiny["data"]
    knn = make_run(tmp_path / "main_knn" / "bbb", worker="main_knn", encoder=str(pretrained), data=data, k=[1, 5])
    common = {"worker": "main_linprobe", "encoder": str(pretrained), "data": data, "epochs": 2, "warmup_epochs": 1}
    cached = make_run(tmp_path / "main_linprobe" / "ccc", **common, batch_size=32)
    augmented = make_run(
        tmp_path / "main_linprobe" / "ddd",
        **{**common, "augment": "crop", "cache_features": False, "features": "cls", "optimizer": "lars"},
        batch_size=16,
        env={"nproc": 2},
    )
    for folder, processes in ((knn, 1), (cached, 1), (augmented, 2)):
        done = work(folder, processes)
        assert done.returncode == 0, done.stdout + done.stderr
    metrics = [
        json.loads((folder / rundir.DONE).read_text())["metrics"] for folder in (pretrained, knn, cached, augmented)
    ]
    assert metrics[0]["knn/loo1"] == metrics[1]["knn/loo1"]
    assert set(metrics[1]) == {"knn/loo1", "knn/top1_k1", "knn/top1_k5"}
    names = {"linprobe/top1", "linprobe/top5", "linprobe/best_top1", "linprobe/loss"}
    assert set(metrics[2]) == set(metrics[3]) == names
    assert all(0 <= value <= 1 for each in metrics for name, value in each.items() if not name.endswith("/loss"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("missing", "no file"),
        ("truncated", "cut short, damaged"),
        ("foreign", "not an encoder"),
        ("wrong", "foreign.key"),
    ],
)
def test_an_encoder_that_cannot_be_used_is_one_clear_line(tmp_path, spoil, says):
    path = tmp_path / "encoder.pt"
    if spoil == "truncated":
        path.write_bytes(b"PK\x03\x04 not much")
    elif spoil == "foreign":
        torch.save({"state_dict": {}}, path)
    elif spoil == "wrong":
        kwargs = {"dim": 12, "depth": 1, "heads": 3, "patch_size": 4, "grid_size": 4}
        torch.save({"name": "vit", "kwargs": kwargs, "state": {"foreign.key": torch.ones(1)}, "from": "x"}, path)
    with pytest.raises(EncoderError, match=says) as error:
        load_encoder(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_encoder_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"name": "vit", "kwargs": {}, "state": Evil(), "from": "x"}, tmp_path / "encoder.pt")
    with pytest.raises(EncoderError):
        load_encoder(str(tmp_path))
    assert not (tmp_path / "owned").exists()


def test_a_missing_encoder_ends_the_worker_with_1_and_says_so(tmp_path, make_run, work, tiny):
    folder = make_run(tmp_path / "r", worker="main_knn", encoder=str(tmp_path / "none"), data=tiny["data"])
    done = work(folder)
    assert done.returncode == 1
    assert len([line for line in done.stdout.splitlines() if "error: encoder=" in line]) == 1
