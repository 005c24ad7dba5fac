"""Batched views: each picture as if it were alone, maps that follow it, and what is refused."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from contract import rundir
from contract.settings import SettingsError
from contract.settings.preview import Settings
from contract.settings.views import PARTS
from workers import preview
from workers.data import fake
from workers.data.loader import train_loader
from workers.engine import distributed
from workers.transforms import blur, color, draws, foveation, hide, magnification, pyramid, saliency, views, windows

SIDE = 32


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return F.interpolate(torch.rand(5, 3, 8, 8), SIDE, mode="bicubic").clamp(0, 1)


@pytest.fixture
def maps(images: Tensor) -> Tensor:
    return saliency.contrast(images)


def numbers(b: int, amount: int) -> Tensor:
    return torch.rand(b, amount, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def settings(**values) -> Settings:
    return Settings(worker="preview", **values)


# -- whole views -------------------------------------------------------------------------------------------------------


def test_the_settings_say_all_that_build_takes():
    taken = set(inspect.signature(views.build).parameters) - {"size"}
    assert set(settings().view_options()) == taken
    assert None not in [settings().view_options()[key] for key in PARTS["none"]]


@pytest.mark.parametrize("augment", PARTS)
def test_a_picture_is_seen_as_if_it_were_alone(augment, images, maps):
    view = views.build(SIDE, **settings(augment=augment).view_options())
    u = numbers(len(images), view.numbers)
    together = view(images, u, maps)
    assert together.shape == images.shape
    assert 0 <= together.min() <= together.max() <= 1 + 1e-6
    for i in range(len(images)):
        alone = view(images[i : i + 1], u[i : i + 1], maps[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-5)
    if augment == "none":
        assert torch.equal(together, images)
    else:
        assert not torch.allclose(together, images, atol=1e-2)


def test_all_views_come_one_after_the_other_and_take_bytes(images):
    view = views.build(SIDE)
    u = numbers(len(images) * 2, view.numbers).view(len(images), 2, -1)
    raw = (images * 255).round().to(torch.uint8)
    both = view.all(raw, u)
    assert torch.equal(both[: len(images)], view(raw.float() / 255, u[:, 0]))
    assert torch.equal(both[len(images) :], view(raw.float() / 255, u[:, 1]))


def test_the_loader_gives_numbers_of_the_picture_and_the_epoch():
    data = fake.load("train", None, length=12, size=40, classes=2)
    kwargs = {"seed": 3, "rank": 0, "world": 1, "fold": distributed.fold}
    loader = train_loader(data, views.Numbered(SIDE, 7, n_views=2), 4, **kwargs)
    found = {}
    for epoch in (0, 0, 1):
        loader.sampler.start(epoch, 0)
        for (pictures, u), _, index in loader:
            assert pictures.shape == (4, 3, SIDE, SIDE)
            assert u.shape == (4, 2, 7)
            for i, row in zip(index.tolist(), u, strict=True):
                assert torch.equal(found.setdefault((epoch, i), row), row)
    assert len({tuple(row.flatten().tolist()) for row in found.values()}) == len(found) == 24


@pytest.mark.parametrize("augment", ["simclr", "saliency_crop", "uniform_crop", "magnification", "exponential"])
@pytest.mark.parametrize("crop_pad", [False, True])
def test_maps_move_as_pixels_do(augment, crop_pad, images, maps):
    options = {"jitter_prob": 0.0, "gray_prob": 0.0, "blur": False, "crop_pad": crop_pad}
    view = views.build(SIDE, **settings(augment=augment, **options).view_options())
    drawn = view.draw(numbers(len(images), view.numbers), (SIDE, SIDE), maps)
    assert torch.allclose(view.follow(images[:, :1], drawn), view.apply(images, drawn)[:, :1], atol=1e-5)


def test_a_flipped_picture_is_looked_at_where_its_flipped_map_says(images):
    peak = torch.zeros(len(images), 1, SIDE, SIDE)
    peak[:, :, 9, 6] = 100
    for still, column in ((False, SIDE - 1 - 6), (True, 6)):
        said = settings(augment="salient_magnification", hflip=1.0, sample_border=2, still_maps=still)
        view = views.build(SIDE, **said.view_options())
        drawn = view.draw(numbers(len(images), view.numbers), (SIDE, SIDE), peak)
        assert drawn[-1].fixations.tolist() == [[9, column]] * len(images)


# -- parts, against plain versions -------------------------------------------------------------------------------------


def test_picks_follow_their_weights():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)[None, :-1]
    found = draws.pick(u, weights)[0].bincount(minlength=5)
    assert found.tolist() == [0, 1000, 0, 3000, 0]
    assert draws.integers(torch.tensor([0.0, 0.999999, 0.5]), 2, 5).tolist() == [2, 4, 3]


def test_windows_are_torchvisions_with_and_without_shrinking(images):
    boxes = torch.tensor([[0, 0, 32, 32], [3, 5, 20, 9], [1, 2, 30, 28], [4, 0, 7, 32], [9, 9, 5, 5]])
    flip = torch.tensor([True, False, False, True, False])
    for size in (12, 32, 48):
        out = windows.cut(images, boxes, size, flip)
        for i, (top, left, h, w) in enumerate(boxes.tolist()):
            expected = TF.resized_crop(images[i], top, left, h, w, [size, size], antialias=True)
            assert torch.allclose(out[i], expected.flip(-1) if flip[i] else expected, atol=1e-5)


def test_random_windows_lie_inside_and_have_their_area_and_aspect():
    boxes = windows.random_windows(numbers(500, 22), 40, 30, (0.2, 0.6), (0.5, 2.0)).double()
    top, left, h, w = boxes.unbind(1)
    assert bool(((top >= 0) & (left >= 0) & (top + h <= 40) & (left + w <= 30)).all())
    assert 0.18 < (h * w / 1200).min() < (h * w / 1200).max() < 0.62
    assert (w / h).min() < 0.6
    assert windows.random_windows(numbers(1, 22), 4, 40, (1.0, 1.0), (1.0, 1.0)).tolist() == [[0, 18, 4, 4]]


@pytest.mark.parametrize("step", range(4))
def test_each_change_of_colour_is_torchvisions(step, images):
    factors = torch.tensor([[0.3, 1.7, 0.5, -0.2], [1.8, 0.2, 1.9, 0.17]]).expand(2, 4)
    names = ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"]
    for i in range(2):
        ours = color.CHANGES[step](images[i : i + 1].clone(), factors[i, step].view(1, 1, 1, 1))
        theirs = getattr(TF, names[step])(images[i : i + 1], factors[i, step].item())
        assert torch.allclose(ours, theirs, atol=2e-4)  # they weigh red with 0.2989


def test_changes_come_in_each_pictures_own_order(images):
    order = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [0, 1, 2, 3], [2, 3, 0, 1]])
    factors = numbers(5, 4).float() + 0.4
    factors[:, 3] -= 0.8
    on = torch.tensor([True, True, True, False, True])
    out = color.jitter(images, color.Jitter(order, factors, on, ~on))
    for i in range(5):
        x = images[i : i + 1].clone()
        for step in order[i].tolist() if on[i] else []:
            x = color.CHANGES[step](x, factors[i, step].view(1, 1, 1, 1))
        expected = x if on[i] else color.luma(x).expand_as(x)
        assert torch.allclose(out[i], expected[0], atol=1e-6)


def test_blur_that_is_not_drawn_changes_nothing(images):
    step = blur.GaussianBlur(size=5, probability=0.0)
    assert torch.equal(step.apply(images, step.draw(numbers(5, 2), (SIDE, SIDE))), images)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_foveation_is_that_of_all_rings_over_the_whole_picture(height, width):
    torch.manual_seed(0)
    images = torch.rand(4, 3, height, width)
    points = torch.tensor([[5, 6], [12, 20], [23, 1], [0, 31]])
    radius, spacing, growth = torch.tensor([2.0, 5.0, 3.0, 1.5], dtype=torch.float64), 0.25, 0.15
    out = foveation.foveate(images, foveation.Fovea(points, radius), growth=growth, spacing=spacing)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for i, (row, column) in enumerate(points.tolist()):
        log = (torch.hypot((y - row).double(), (x - column).double()).log() - radius[i].log()) / spacing
        whole = images[i].double() * foveation.raised_cosine(log.clamp(0, 1))
        for n in range(1, int((log.max() + 1).ceil()) + 1):
            sigma = growth * radius[i].item() * math.exp(n * spacing)
            size = int(foveation.kernel_sizes(torch.tensor([sigma]))[0])
            level = blur.blur(images[i : i + 1], torch.tensor([sigma]), size)[0] if size > 1 else images[i]
            whole += foveation.raised_cosine(log - n) * level
        assert torch.allclose(out[i].double(), whole.clamp(0, 1), atol=2e-5)


def test_a_flat_map_draws_all_points_alike_and_a_cold_one_the_peak():
    maps = torch.zeros(1, 1, 10, 12)
    u = (torch.arange(48, dtype=torch.float64) + 0.5) / 48
    points = torch.cat([saliency.fixations(each[None], maps, 1.0, border=2) for each in u])
    assert sorted(points.tolist()) == [[row, column] for row in range(2, 8) for column in range(2, 10)]
    maps[0, 0, 4, 7] = 1
    cold = torch.cat([saliency.fixations(each[None], maps, 0.01, border=2) for each in u])
    assert cold.tolist() == [[4, 7]] * 48


def test_cut_windows_keep_to_the_picture_and_published_ones_move():
    chosen = torch.tensor([[-4, 5, 10, 10], [20, -3, 20, 8]])
    assert saliency.inside(chosen, 32, 32).tolist() == [[0, 5, 6, 10], [20, 0, 12, 5]]
    assert saliency.inside(chosen, 32, 32, published=True).tolist() == [[0, 5, 10, 10], [20, 0, 12, 8]]


# -- across eye movements ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "random_patches", "periphery", "foveate"])
def test_what_is_not_hidden_is_seen_as_it_is(mode, images):
    eye = hide.EyeMovement(SIDE, mode, 0.6)
    found = eye.apply(images, eye.draw(numbers(5, eye.numbers), (SIDE, SIDE)))
    assert found.mask.shape == (5, 1, SIDE, SIDE)
    assert torch.equal(found.sample.masked_fill(found.mask, 0), found.target.masked_fill(found.mask, 0))
    if mode in ("random_patches", "periphery"):
        assert found.mask.float().mean().item() == pytest.approx(0.6, abs=0.05)
    elif mode == "none":
        assert torch.equal(found.sample, found.target)


def test_weights_of_the_pyramid_can_be_kept_between_the_levels(images):
    assert pyramid.level_weights(SIDE, SIDE).amin() < -0.3
    kept = pyramid.level_weights(SIDE, SIDE, clamp=True)
    assert 0 <= kept.min() <= kept.max() <= 1
    assert torch.allclose(kept.sum(0), torch.ones(()).double())
    seen, mask = pyramid.foveate(images, clamp_weights=True)
    assert not torch.equal(seen, pyramid.foveate(images)[0])
    assert not mask[0, 0, SIDE // 2, SIDE // 2]


def test_attention_goes_to_the_most_certain_place(images):
    certain = torch.rand(5, 1, SIDE, SIDE)
    certain[:, :, 3, 28] = 2
    eye = hide.EyeMovement(SIDE, "periphery", 0.9, crop=False, attention=True)
    drawn = eye.draw(numbers(5, eye.numbers), (SIDE, SIDE), certain)
    assert drawn.centres.tolist() == [[3, 28]] * 5
    assert not eye.apply(images, drawn).mask[:, 0, 3, 28].any()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: hide.EyeMovement(SIDE, "periphery", 1.2), "ratio=1.2"),
        (lambda: hide.EyeMovement(SIDE, "periphery", 1.0), "ratio=1.0"),
        (lambda: hide.EyeMovement(SIDE, "random_patches", 0.0), "hides 0 of 16"),
        (lambda: hide.EyeMovement(SIDE, "random_patches", 1.0), "hides 16 of 16"),
        (lambda: hide.EyeMovement(SIDE, "random_patches", 0.5, patch=40), "patch=40"),
        (lambda: hide.EyeMovement(SIDE, "foveate", attention=True), "periphery only"),
        (lambda: views.build(SIDE, crop="salient", crop_temperature=0), "temperature=0"),
        (lambda: views.build(SIDE, magnification="quadratic", sample_temperature=-1), "temperature=-1"),
        (lambda: views.build(SIDE, foveation=True, fovea_area=(0.5, 1.5)), "area=0.5, 1.5"),
        (lambda: views.build(SIDE, magnification="exponential", cover_ratio=(0.7, 0.1)), "cover=0.7, 0.1"),
        (lambda: views.build(SIDE, min_crop=1.5), "scale=1.5"),
    ],
)
def test_settings_that_cannot_work(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


def test_pictures_and_maps_that_do_not_fit(images, maps):
    fovea = foveation.Fovea(torch.tensor([[3, SIDE]] * 5), torch.ones(5))
    with pytest.raises(ValueError, match=f"column {SIDE}: outside the picture"):
        foveation.foveate(images, fovea)
    with pytest.raises(ValueError, match="row -1"):
        magnification.looks(magnification.Retina(torch.tensor([[-1, 0]]), torch.ones(1), torch.ones(1)), 8, 8)
    with pytest.raises(ValueError, match="are too small"):
        blur.blur(images, torch.ones(5), 2 * SIDE + 1)
    with pytest.raises(ValueError, match="not whole ones"):
        hide.patches(torch.zeros(1, 9).long(), 3, 10, SIDE, SIDE)
    with pytest.raises(ValueError, match="border=16: leaves no pixel"):
        foveation.uniform_fixations(numbers(5, 2), SIDE, SIDE, 16)
    view = views.build(SIDE, crop="salient")
    u = numbers(5, view.numbers)
    for wrong, complaint in (
        (None, "given none"),
        (maps[..., :-1], "expected 1 x 32 x 32"),
        (maps.expand(-1, 3, -1, -1), "maps of 3 x 32 x 32"),
        (maps / 0, "not finite"),
        (maps[:3], "3 maps for 5 pictures"),
    ):
        with pytest.raises(ValueError, match=complaint):
            view(images, u, wrong)
    with pytest.raises(ValueError, match="expected \\(B, "):
        view(images, u[:, 1:], maps)
    with pytest.raises(ValueError, match="3 channels"):
        view(images[:, :1], u, maps)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"crop_temperature": 0}, "crop_temperature=0"),
        ({"fovea_area": [0.5, 0.1]}, "fovea_area="),
        ({"cover_ratio": []}, "cover_ratio="),
        ({"min_crop": 1.2}, "min_crop=1.2"),
        ({"masking_ratio": -0.1}, "masking_ratio"),
        ({"masking_mode": "random_patches", "mask_patch_size": 7}, "must divide image_size=96"),
    ],
)
def test_the_launcher_refuses(said, complaint):
    with pytest.raises(SettingsError, match=complaint):
        settings(**said)


# -- the worker --------------------------------------------------------------------------------------------------------


def test_preview_leaves_a_sheet(tmp_path, make_run, work):
    said = {"augment": "salient_magnification", "image_size": SIDE, "number": 2, "n_views": 2}
    folder = make_run(tmp_path / "p", worker="preview", **said)
    done = work(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / rundir.FIGURES / "views.png").stat().st_size > 5000
    assert (folder / rundir.DONE).exists()


def test_preview_shows_what_is_seen_beside_what_is_to_be_predicted(images, tmp_path):
    titles, columns = preview.look(settings(image_size=SIDE, n_views=2, masking_mode="periphery"), images)
    assert titles == ["picture", "seen 1", "to predict 1", "seen 2", "to predict 2"]
    assert [each.shape for each in columns] == [images.shape] * 5
    preview.draw_sheet(titles, columns, "caption", tmp_path / "views.png")
    assert (tmp_path / "views.png").stat().st_size > 5000


def test_preview_says_in_a_line_what_cannot_be_drawn(tmp_path, make_run, work):
    folder = make_run(tmp_path / "p", worker="preview", image_size=SIDE, augment="magnification", sample_border=40)
    done = work(folder)
    assert done.returncode == 1
    assert "border=40: leaves no pixel of 32 x 32" in done.stdout
