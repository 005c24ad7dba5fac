"""Foveation, blur, magnification, saliency crops and whole views against the published program's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.stored import arrays, cases
from workers.transforms import blur, foveation, magnification, saliency, windows
from workers.transforms.color import Jitter, jitter


def pictures(stored: dict[str, Tensor]) -> dict[int, Tensor]:
    """``image0_u8`` and so on, (H, W, 3) uint8 -> (1, 3, H, W) in [0, 1]."""
    found = {k.removeprefix("image").removesuffix("_u8"): v for k, v in stored.items() if k.endswith("_u8")}
    return {int(k): unit(v)[None] for k, v in found.items() if k.isdecimal()}


def unit(picture: Tensor) -> Tensor:
    return picture.movedim(-1, -3).float() / 255


def worst(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


@pytest.mark.parametrize("path", cases("bio/bio_foveate_at.npz"))
def test_foveation_at_a_point(path: Path) -> None:
    stored = arrays(path)
    images, points = pictures(stored), stored["at_pnt_rowcol"]
    for k, (growth, fovea, spacing) in enumerate(stored["at_params_kerW_e0_spacing"].tolist()):
        image = images[int(stored["at_img"][k])]
        height, width = image.shape[-2:]
        radius = fovea / foveation.degrees(torch.ones(1, dtype=torch.float64), height, width)
        gap = torch.tensor([spacing], dtype=torch.float64)
        rings = foveation.rings_at(points[k : k + 1], radius, gap, height, width)
        assert rings.item() == stored["at_Ne"][k]
        draws = foveation.Fovea(points[k : k + 1], radius)
        out = foveation.foveate(image, draws, growth=growth, spacing=spacing, rings=rings, clamp=False)
        assert worst(out[0], stored[f"out{k}"]) < 3e-5


@pytest.mark.parametrize("path", cases("bio/bio_foveate_random.npz"))
def test_foveation_at_random_all_pictures_at_once(path: Path) -> None:
    stored = arrays(path)
    images = pictures(stored)
    batch = torch.cat([images[i] for i in stored["image_index"].tolist()])
    height, width = batch.shape[-2:]
    radius = (stored["area_ratio"] * height * width / math.pi).sqrt()
    draws = foveation.Fovea(stored["row_col"], radius)
    rings = foveation.rings_to_corner(draws.fixations, radius, stored["spacing"], height, width)
    assert torch.equal(rings, stored["n_rings"])
    ring = torch.arange(1, stored["ring_sigma_px"].shape[1] + 1)
    sigma = stored["kerW_coef"][:, None] * radius[:, None] * (ring * stored["spacing"][:, None]).exp()
    there = ring <= rings[:, None]
    assert torch.equal(foveation.kernel_sizes(sigma)[there], stored["ring_kernel_size"][there])
    if "out" in stored:
        out = foveation.foveate(batch, draws, growth=stored["kerW_coef"], spacing=stored["spacing"])
        assert worst(out, stored["out"]) < 3e-5


@pytest.mark.parametrize("path", cases("bio/bio_gaussian_blur.npz"))
def test_blur_with_a_width_for_each_picture(path: Path) -> None:
    stored = arrays(path)
    image, sigma = unit(stored["image_u8"]), stored["sigma"]
    out = blur.blur(image.expand(len(sigma), -1, -1, -1), sigma, blur.simclr_size(image.shape[-1]))
    for k in range(len(sigma)):
        if f"float_{k}" in stored:
            assert worst(out[k], stored[f"float_{k}"]) < 1e-5
        assert (out[k] * 255 - stored[f"pil_{k}"].movedim(-1, 0)).abs().max() < 2  # two roundings to 8 bits


def grids(stored: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The sampling grids of every stored case, as Y and X (H, W)."""
    found = {}

    def radial(form, point, size, *, fovea=1.0, fall=1.0, slope=1.0, cover=math.nan):
        draws = magnification.Retina(
            point[None].long(),
            torch.tensor([1.0 if math.isnan(cover) else cover], dtype=torch.float64),
            torch.tensor([slope], dtype=torch.float64),
        )
        where = magnification.looks(draws, *size, form, fovea, fall)
        return tuple(each[0] for each in magnification.pixels(where, *size))

    size = tuple(stored["quad0_X"].shape)
    for k, (fov, fall, cover) in enumerate(stored["quad_fov_K_cover"].tolist()):
        found[f"quad{k}"] = radial("quadratic", stored["quad_row_col"][k], size, fovea=fov, fall=fall, cover=cover)
    for k, (slope, cover) in enumerate(stored["exp_slope_cover"].tolist()):
        found[f"exp{k}"] = radial("exponential", stored["exp_row_col"][k], size, slope=slope, cover=cover)
    for k, point in enumerate(stored["lin_row_col"].tolist()):
        found[f"lin{k}"] = magnification.separable(tuple(point), *size, "linear")
    for k, (point, cutoff) in enumerate(
        zip(stored["norm_row_col"].tolist(), stored["norm_cutoff"].tolist(), strict=True)
    ):
        found[f"norm{k}"] = magnification.separable(tuple(point), *size, "normal", cutoff)
    for name, key in (("quad_nonsquare", "nonsquare"), ("quad_oddsize", "odd")):
        if f"image_{key}_u8" in stored:
            row, column, fov, fall, cover = stored[f"{key}_row_col_fov_K_cover"].tolist()
            size = tuple(stored[f"image_{key}_u8"].shape[:2])
            point = torch.tensor([row, column])
            found[name] = radial("quadratic", point, size, fovea=fov, fall=fall, cover=cover)
    return found


@pytest.mark.parametrize("path", cases("bio/bio_magnif_grids.npz"))
def test_magnification_looks_where_the_published_one_does_and_sees_the_same(path: Path) -> None:
    stored = arrays(path)
    seen = path.with_name("bio_magnif_images.npz")
    looks = arrays(seen) if seen.exists() else {}
    images = pictures(looks)
    for name, (y, x) in grids({**stored, **looks}).items():
        if f"{name}_Y" in stored:
            assert worst(y, stored[f"{name}_Y"]) < 8e-5, name
            assert worst(x, stored[f"{name}_X"]) < 8e-5, name
        if name in looks:
            special = {"quad_nonsquare": "image_nonsquare_u8", "quad_oddsize": "image_odd_u8"}
            image = unit(looks[special[name]])[None] if name in special else images[int(name[-1]) % len(images)]
            assert (
                worst(magnification.sample(image, magnification.places(y, x, *image.shape[-2:])[None])[0], looks[name])
                < 1e-4
            ), name


@pytest.mark.parametrize("path", cases("bio/bio_magnif_sampling.npz"))
def test_fixations_are_drawn_from_the_published_density(path: Path) -> None:
    stored = arrays(path)
    images = pictures(stored)
    maps = stored["salmap"][None, None]
    for temperature, border, flat, row, column, cover in stored["draws_T_bdr_flatindex_row_col_ratio"].tolist():
        key = f"T{temperature}_b{int(border)}"
        weights = saliency.density(maps, temperature, int(border))
        assert worst(weights[0], stored[f"density_{key}"]) < 1e-5
        upto = weights.double().flatten().cumsum(0)
        u = (upto[int(flat)] - weights.flatten()[int(flat)] / 2) / upto[-1]
        assert saliency.fixations(u[None], maps, temperature, int(border)).tolist() == [[row, column]]
        if f"out_{key}" in stored:
            where = magnification.looks(retina(row, column, cover), *maps.shape[-2:])
            outs = [magnification.sample(image, where)[0] for image in images.values()]
            assert min(worst(out, stored[f"out_{key}"]) for out in outs) < 1e-4
    if "uniform_last_out" in stored:
        where = magnification.looks(retina(*stored["uniform_draws_row_col_ratio"][-1].tolist()), *maps.shape[-2:])
        assert worst(magnification.sample(images[1], where)[0], stored["uniform_last_out"]) < 1e-4


def retina(row: float, column: float, cover: float) -> magnification.Retina:
    return magnification.Retina(
        torch.tensor([[row, column]]).long(),
        torch.tensor([cover], dtype=torch.float64),
        torch.ones(1, dtype=torch.float64),
    )


@pytest.mark.parametrize("path", cases("bio/bio_salcrop.npz"))
def test_saliency_crops_take_the_published_windows(path: Path) -> None:
    stored = arrays(path)
    images = pictures(stored)
    for k, (which, temperature, border, pad, _) in enumerate(stored["case_image_T_bdr_pad_seed"].tolist()):
        image, maps = images[int(which)], stored[f"salmap{int(which)}"][None, None]
        weights = saliency.density(maps, temperature, int(border))
        chosen = saliency.salient_windows(numbers(stored["tries_area_aspect_flatindex_overlap"][k], weights), weights)
        assert torch.equal(chosen[0], stored["window_i_j_h_w"][k])
        if not pad:
            chosen = saliency.inside(chosen, *maps.shape[-2:], published=True)
        assert torch.equal(chosen[0], stored["window_clamped_or_padded_i_j_h_w"][k])
        off = (windows.cut(image, chosen, image.shape[-1])[0] * 255 - stored["out_u8"][k].movedim(-1, 0)).abs()
        assert off.max() < 1.05
        assert off.mean() < 0.35


def numbers(tries: Tensor, weights: Tensor) -> Tensor:
    """The uniform numbers (1, 3 * TRIES) that give the stored draws (tries, 4) of area, aspect, centre, overlap."""
    area, aspect, centre, _ = tries.unbind(1)
    upto = weights.double().flatten().cumsum(0)
    at = centre.nan_to_num(0).long()
    u = torch.stack(
        [
            (area - 0.08) / 0.92,
            (aspect.log() - math.log(3 / 4)) / (2 * math.log(4 / 3)),
            (upto[at] - weights.flatten()[at] / 2) / upto[-1],
        ]
    )
    u[:, centre.isnan()] = 0.0
    return torch.nn.functional.pad(u, (0, saliency.TRIES - len(tries))).flatten()[None]


@pytest.mark.parametrize("path", cases("bio/bio_pipeline.npz"))
def test_whole_views(path: Path) -> None:
    stored = arrays(path)
    images = pictures(stored)
    kinds = {key.removesuffix("_crop") for key in stored if f"{key.removesuffix('_crop')}_sigma" in stored}
    batch = torch.cat([images[i] for i in stored["image_index"].tolist()])
    size = batch.shape[-1]
    assert kinds
    for kind in sorted(kinds):
        found = {key.removeprefix(f"{kind}_"): value for key, value in stored.items() if key.startswith(f"{kind}_")}
        x = windows.cut(batch, found["crop"], size, found["u_flip"] < 0.5)
        draws = Jitter(
            found["order"].clamp(min=0),
            found["bcsh"].nan_to_num(1),
            (found["u_jitter"] <= 0.8) & (found["order"] >= 0).all(1),
            found["u_gray"] < 0.2,
        )
        x = blur.blur(jitter(x, draws), found["sigma"], blur.simclr_size(size))
        for k, out in enumerate(x):
            off = (out - stored[f"out_{kind}_{k}"]).abs()  # theirs is rounded to 8 bits after every step
            assert off.mean() < 0.009, (kind, k)
            assert off.max() < 0.035, (kind, k)
