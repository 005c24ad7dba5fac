"""Views per CPU-second, one thread: our batched transforms against one picture at a time, as the papers describe it.

The slow side is what one writes from the papers with Pillow, torchvision and numpy, one picture after the other; its
draws are made as it goes, ours are counted too. Blurs are separable on both sides.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from workers.transforms import pyramid, views
from workers.transforms.foveation import Foveation
from workers.transforms.hide import EyeMovement
from workers.transforms.magnification import Magnification
from workers.transforms.saliency import SalientWindow
from workers.transforms.step import Step

SIDE, PICTURES, ROUNDS = 96, 128, 5
NUMPY = np.random.default_rng(0)


# -- one picture at a time ---------------------------------------------------------------------------------------------


def random_patches(image: Tensor, ratio: float = 0.6, patch: int = 8) -> Tensor:
    grid = SIDE // patch
    places = [(i, j) for i in range(grid) for j in range(grid)]
    random.shuffle(places)
    mask = torch.zeros_like(image)
    for i, j in places[: int(grid * grid * ratio)]:
        mask[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = 1
    return torch.where(mask == 1, image.mean((1, 2), keepdim=True), image)


def periphery(image: Tensor, ratio: float = 0.8) -> Tensor:
    radius = int(math.sqrt(SIDE * SIDE * (1 - ratio) / math.pi))
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    mask = ((y - SIDE // 2) ** 2 + (x - SIDE // 2) ** 2 > radius**2).float().repeat(3, 1, 1)
    return torch.where(mask == 1, image.mean((1, 2), keepdim=True), image)


def saliency_crop(image: Image.Image, saliency: Tensor, temperature: float = 1.5) -> Tensor:
    density = ((saliency - saliency.max()) / temperature).exp().flatten()
    area = SIDE * SIDE
    for _ in range(30):
        size = area * torch.empty(1).uniform_(0.08, 1.0).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        w, h = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        row, column = divmod(int(torch.multinomial(density, 1)), SIDE)
        top, left = row - h // 2, column - w // 2
        seen = (min(top + h, SIDE) - max(top, 0)) * (min(left + w, SIDE) - max(left, 0))
        if 0.08 * area < seen < area:
            break
    top, left = max(top, 0), max(left, 0)
    return TF.to_tensor(TF.resized_crop(image, top, left, min(h, SIDE - top), min(w, SIDE - left), [SIDE, SIDE]))


def magnification(image: Tensor, form: str) -> Tensor:
    row, column = (NUMPY.integers(16, SIDE - 16) for _ in range(2))
    cover = NUMPY.uniform(0.05, 0.7)
    half = SIDE // 2
    x, y = np.meshgrid(np.arange(-half + 0.5, half), np.arange(-half + 0.5, half))
    r = np.sqrt(x**2 + y**2)
    if form == "quadratic":
        fovea, fall = 20, 20
        away = np.where(r < fovea, r, (r + fall) ** 2 / (2 * (fovea + fall)) + fovea - (fovea + fall) / 2)
    else:
        away = (np.exp(1.5 * r / np.hypot(half, half)) - 1) / 1.5
    reach = np.hypot(max(SIDE - row, row), max(SIDE - column, column))
    scale = reach / away.max() * np.sqrt(cover)
    to_x, to_y = column + scale * away * x / r, row + scale * away * y / r
    grid = torch.tensor(np.stack([to_x / SIDE * 2 - 1, to_y / SIDE * 2 - 1], axis=-1), dtype=torch.float32)
    return F.grid_sample(image[None], grid[None], align_corners=False)[0]


def gaussian(size: int, sigma: float) -> Tensor:
    x = torch.arange(size) - size // 2
    weight = (-0.5 * (x / sigma) ** 2).exp()
    return weight / weight.sum()


def blurred(image: Tensor, size: int, sigma: float) -> Tensor:
    """Separable, which torchvision's own is not."""
    taps = gaussian(size, sigma).expand(3, 1, size)
    x = F.pad(image[None], [size // 2] * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, taps[..., None], groups=3), taps[:, :, None], groups=3)[0]


def foveation(image: Tensor, growth: float = 0.06, spacing: float = 0.2) -> Tensor:
    row, column = (int(torch.randint(12, SIDE - 12, ())) for _ in range(2))
    degree = 20 / math.hypot(SIDE, SIDE)
    inner = degree * math.sqrt(SIDE * SIDE * NUMPY.uniform(0.01, 0.5) / math.pi)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    where = degree * torch.sqrt((y - row) ** 2 + (x - column) ** 2)
    log = where.log()
    rings = math.ceil((math.log(where.max()) - math.log(inner)) / spacing + 1)

    def cosine(t: Tensor) -> Tensor:
        t = t.abs()
        return torch.where(t < 0.25, 1.0, torch.where(t > 0.75, 0.0, torch.cos(math.pi * (t - 0.25)) ** 2))

    out = image * cosine(((log - math.log(inner)) / spacing).clamp(0, 1))
    for n in range(1, rings + 1):
        sigma = growth * inner * math.exp(n * spacing) / degree
        size = int(3 * sigma)
        size += size % 2 == 0
        ring = cosine((log - math.log(inner)) / spacing - n)
        out = out + ring * (blurred(image, size, sigma) if size > 1 else image)
    return out.clamp(0, 1)


def foveate(image: Tensor) -> Tensor:
    levels, sizes, x = [image], [SIDE], image
    for _ in range(5):
        x = TF.gaussian_blur(x, [5, 5], [pyramid.SIGMA] * 2)
        sizes.append(sizes[-1] // 2)
        x = TF.resize(x, [sizes[-1]] * 2, antialias=False)
        enlarged = x
        for size in sizes[-2::-1]:
            enlarged = TF.resize(enlarged, [size] * 2, antialias=False)
        levels.append(enlarged)
    sigma, p, alpha = pyramid.SIGMA, pyramid.PIXELS_PER_DEGREE, pyramid.ALPHA
    y, x = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    acuity = alpha / (np.hypot(y - SIDE // 2, x - SIDE // 2) / p + alpha)
    through = [np.exp(-((2 ** (i - 3) * acuity / sigma) ** 2) / 2) for i in range(1, 6)] + [np.zeros_like(acuity)]
    edges = np.array([sigma * math.sqrt(2 * math.log(2)) / 2 ** (i - 3) for i in range(1, 6)] + [0])
    edges = (edges - edges.min()) / (edges.max() - edges.min())
    weights = np.zeros((6, SIDE, SIDE))
    for i in range(1, 6):
        layer = (acuity >= edges[i]) & (acuity <= edges[i - 1])
        if i == 1:
            weights[0][layer] = 1
        else:
            finer = (0.5 - through[i]) / (through[i - 1] - through[i] + 1e-5)
            weights[i - 1][layer], weights[i - 2][layer] = (1 - finer)[layer], finer[layer]
    blend = torch.from_numpy(weights).float()
    return sum(level * weight for level, weight in zip(levels, blend, strict=True)).clamp(0, 1)  # type: ignore[union-attr]


SIMCLR = T.Compose(
    [
        T.RandomResizedCrop(SIDE),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.ToTensor(),
    ]
)


def simclr(image: Image.Image) -> Tensor:
    return blurred(SIMCLR(image), 9, NUMPY.uniform(0.1, 2.0))


# -- both sides --------------------------------------------------------------------------------------------------------


def ours(step: Step | EyeMovement | views.View, images: Tensor, maps: Tensor) -> object:
    u = torch.rand(len(images), step.numbers, dtype=torch.float64)
    return step.apply(images, step.draw(u, (SIDE, SIDE), maps))


def timed(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # smooth pictures: of noise, colours are nothing like those of photographs
    images = F.interpolate(torch.rand(PICTURES, 3, 12, 12), SIDE, mode="bicubic").clamp(0, 1)
    images = images.mul(255).round().div(255)
    maps = F.interpolate(torch.randn(PICTURES, 1, 6, 6) * 2, SIDE, mode="bicubic")
    pillow = [TF.to_pil_image(image) for image in images]

    sides: dict[str, tuple[Callable[[int], Tensor], Step | EyeMovement | views.View]] = {
        "random patches": (lambda i: random_patches(images[i]), EyeMovement(SIDE, "random_patches", 0.6, crop=False)),
        "periphery": (lambda i: periphery(images[i]), EyeMovement(SIDE, "periphery", 0.8, crop=False)),
        "saliency crop": (
            lambda i: saliency_crop(pillow[i], maps[i]),
            SalientWindow(SIDE, 1.5, published=True, flip=0),
        ),
        "magnification quadratic": (lambda i: magnification(images[i], "quadratic"), Magnification("quadratic")),
        "magnification exponential": (lambda i: magnification(images[i], "exponential"), Magnification("exponential")),
        "foveation": (lambda i: foveation(images[i]), Foveation()),
        "foveate (pyramid)": (lambda i: foveate(images[i]), EyeMovement(SIDE, "foveate", crop=False)),
        "SimCLR view": (lambda i: simclr(pillow[i]), views.build(SIDE)),
    }
    for name, (slow, fast) in sides.items():
        if args.only not in name:
            continue
        some = range(0, PICTURES, 4)
        seconds: list[tuple[float, float]] = []
        for turn in range(args.rounds + 1):
            a = timed(lambda slow=slow, some=some: [slow(i) for i in some]) / len(some)
            b = timed(lambda fast=fast: ours(fast, images, maps)) / PICTURES
            if turn:  # the first warms up
                seconds.append((a, b))
        a, b = (statistics.median(each) for each in zip(*seconds, strict=True))
        ratio = statistics.median(x / y for x, y in seconds)
        print(f"{name:26} one by one {1 / a:8.0f} /s   batched {1 / b:8.0f} /s   {ratio:5.1f} x", flush=True)


if __name__ == "__main__":
    main()
