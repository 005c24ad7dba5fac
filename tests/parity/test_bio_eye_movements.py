"""What masked image modelling across eye movements hides of a picture, against the published program's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.stored import arrays, cases
from workers.transforms import hide, pyramid
from workers.transforms.hide import EyeMovement, Gaze
from workers.transforms.windows import Cut, cut


def unit(pictures: Tensor) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) in [0, 1]."""
    return pictures.movedim(-1, -3).float() / 255


def worst(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


def whole(b: int, order: Tensor | None = None, centres: Tensor | None = None) -> Gaze:
    """Draws that crop nothing."""
    return Gaze(
        Cut(torch.zeros(b, 4, dtype=torch.long), torch.zeros(b, dtype=torch.bool)),
        None,
        torch.zeros(b, 0, dtype=torch.long) if order is None else order,
        torch.zeros(b, 2, dtype=torch.long) if centres is None else centres,
    )


def eye(size: int, mode: Any, ratio: float = 0.5, **options: Any) -> EyeMovement:
    return EyeMovement(size, mode, ratio, crop=False, **options)


@pytest.mark.parametrize("path", cases("bio/eyemim_random_patches.npz"))
def test_random_patches(path: Path) -> None:
    stored = arrays(path)
    images = unit(stored["image_u8"])[stored["image_index"]]
    size, side = images.shape[-1], stored["patch_mask"].shape[-1]
    patch = size // side
    for k, ratio in enumerate(stored["ratio"].tolist()):
        hidden = int(side**2 * ratio)
        assert hidden == stored["n_masked"][k]
        mask = hide.patches(stored["perm"][k][None].long(), hidden, patch, size, size)
        assert torch.equal(mask[0, 0, ::patch, ::patch], stored["patch_mask"][k].bool())
        assert worst(hide.fill_mean(images[k : k + 1], mask)[0], stored["sample"][k]) < 1e-5


@pytest.mark.parametrize("path", cases("bio/eyemim_periphery.npz"))
def test_periphery_and_second_disc(path: Path) -> None:
    stored = arrays(path)
    images = unit(stored["image_u8"])
    size = images.shape[-1]
    for k, ratio in enumerate(stored["ratio"].tolist()):
        method = eye(size, "periphery", ratio)
        assert method.radius == stored["radius"][k]
        sample, mask = method.see(images[stored["image_index"][k]][None], whole(1))
        assert torch.equal(mask[0, 0], stored["mask"][k].bool())
        assert worst(sample[0], stored["sample"][k]) < 1e-5
    if "att_ratio" in stored:
        seen = images[stored["att_image_index"]]
        method = eye(size, "periphery", stored["att_ratio"].item(), attention=True)
        sample, mask = method.see(seen, whole(len(seen), centres=stored["att_center_rowcol"]))
        assert torch.equal(mask[:, 0], stored["att_mask"].bool())
        assert worst(sample, stored["att_sample"]) < 1e-5


@pytest.mark.parametrize("path", cases("bio/eyemim_foveate*.npz"))
def test_foveated_pictures_and_their_pyramid(path: Path) -> None:
    stored = arrays(path)
    antialias = path.stem.endswith("_antialias")
    out = next((v for k, v in stored.items() if k.startswith("out_")), None)
    if out is not None:
        pictures = stored if "image_u8" in stored else arrays(path.with_name(path.name.replace("_antialias", "")))
        images = unit(pictures["image_u8"])[stored["image_index"]]
        fixations = stored["fixation_xy"].flip(1)
        seen, mask = pyramid.foveate(images, fixations, antialias=antialias)
        assert worst(seen, out) < 1e-5
        size = images.shape[-1]
        if "fovea_mask_xy" in stored:
            assert torch.equal(mask[:, 0], stored["fovea_mask_xy"].transpose(1, 2).bool())
        if "level_weights_rowcol" in stored:
            table = pyramid.level_weights(size, size)
            for (row, column), weights in zip(fixations.tolist(), stored["level_weights_rowcol"], strict=True):
                ours = table[:, size - 1 - row :, size - 1 - column :][:, :size, :size]
                assert worst(ours.float(), weights) < 1e-5
        if (size // 2, size // 2) in [tuple(each) for each in fixations.tolist()]:
            at = fixations.tolist().index([size // 2, size // 2])
            assert torch.equal(pyramid.foveate(images[at : at + 1], antialias=antialias)[0], seen[at : at + 1])
    for levels in (v for k, v in stored.items() if k.startswith("pyramid_")):
        image = unit(stored["image_u8"]).double()
        for level, expected in enumerate(levels, 1):
            down, up = pyramid.matrices(image.shape[-1], level, antialias)
            assert worst((up @ down @ image @ (up @ down).T)[0].float(), expected) < 1e-5


@pytest.mark.parametrize("path", cases("bio/eyemim_crop.npz"))
def test_crops(path: Path) -> None:
    stored = arrays(path)
    images, boxes = unit(stored["image_u8"]), stored["top_left_h_w"]
    size = images.shape[-1]
    for antialias, key in ((False, "crop_noantialias"), (True, "crop_antialias")):
        if key in stored:
            assert worst(cut(images, boxes, size, antialias=antialias), stored[key]) < 2e-5
    periphery = next(k for k in stored if k.startswith("sample_periphery"))
    ratio = float(periphery.removeprefix("sample_periphery_").replace("_", "."))
    method = EyeMovement(size, "periphery", ratio, crop=True)
    draws = whole(len(images))._replace(cut=Cut(boxes, torch.zeros(len(boxes), dtype=torch.bool)))
    masked = method.apply(images, draws)
    assert worst(masked.sample, stored[periphery]) < 2e-5
    assert torch.equal(masked.target, cut(images, boxes, size))


@pytest.mark.parametrize("path", cases("bio/eyemim_blur.npz"))
def test_blur_flag_as_published_and_as_meant(path: Path) -> None:
    stored = arrays(path)
    images = unit(stored["image_u8"])
    size = images.shape[-1]
    if "blurred" in stored:
        assert worst(hide.heavy_blur(images)[0], stored["blurred"]) < 1e-5
    for name, ratio in (("random_patches", 0.6), ("periphery", 0.8), ("foveate", 0.5), ("None", 0.5)):
        if f"sample_{name}" not in stored:
            continue
        expected, mask = stored[f"sample_{name}"], stored[f"mask_{name}"].bool()
        mode = name.lower()
        draws = whole(1)
        if mode == "random_patches":  # the squares that were hidden come first
            patches = mask[::8, ::8].flatten()
            draws = whole(1, order=torch.cat([patches.nonzero(), (~patches).nonzero()]).T)
        sample, hidden = eye(size, mode, ratio, blur="published").see(images, draws)
        assert torch.equal(hidden[0, 0], mask)
        assert worst(sample[0], expected) < 1e-5, name
        meant, _ = eye(size, mode, ratio, blur="replace").see(images, draws)
        assert torch.equal(meant, torch.where(hidden, hide.heavy_blur(images), meant))
        same = mode in ("foveate", "none")
        assert torch.equal(meant, sample) == same
