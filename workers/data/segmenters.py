"""What finds the main object of a picture: uint8 (3, H, W) and its place in the data set -> certainties (H, W), 0 to 1.

Networks are loaded where they are first used, so that loader processes each have their own.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from workers.data import DataError, Unreadable, shown
from workers.data.segments import first_line, read_published

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = "CPUExecutionProvider"
SIDE = 320  # of the pictures that u2net is given, where the file does not say


class Segmenter(Protocol):
    def __call__(self, image: Tensor, index: int) -> Tensor: ...


class Contrast:
    """How far a pixel's colour is from that of the border, more so near the middle. Needs no weights, knows nothing."""

    def __call__(self, image: Tensor, index: int) -> Tensor:
        x = image.float() / 255
        height, width = x.shape[1:]
        border = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], dim=1)
        away = (x - border.median(1).values[:, None, None]).norm(dim=0)
        row, column = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
        return stretched(away * torch.exp(-(row**2 + column**2) / 2))


class Onnx:
    """Any network from one picture to one map, in an ONNX file, as rembg runs u2net.

    The picture is brought to the network's size, divided by its own maximum and normalised as ImageNet; the first
    output is stretched to [0, 1], cut to bytes and brought back. Resizing is Pillow's Lanczos.
    """

    def __init__(self, path: Path):
        if importlib.util.find_spec("onnxruntime") is None:
            raise DataError("model=onnx: the package onnxruntime is missing; pip install 'sightline[segment]'")
        if not path.is_file():
            raise DataError(f"model_path={shown(path)}: no such file")
        self.path = path
        self.session: Any = None
        load_session(path, [CPU])  # so that a damaged file is refused before any process starts

    def __call__(self, image: Tensor, index: int) -> Tensor:
        from PIL import Image

        if self.session is None:
            self.session = load_session(self.path, providers())
        given = self.session.get_inputs()[0]
        height, width = (each if isinstance(each, int) else SIDE for each in given.shape[2:])
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        small = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), np.float32)
        small = small / max(small.max(), 1e-6)
        x = ((small - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)).transpose(2, 0, 1)[None].astype(np.float32)
        try:
            out: NDArray[np.float32] = self.session.run(None, {given.name: x})[0]
        except Exception as error:  # onnxruntime has a dozen classes of its own
            raise DataError(f"{shown(self.path)}: does not take {x.shape} float32 ({first_line(error)})") from None
        if out.size != out.shape[-1] * out.shape[-2]:
            raise DataError(f"{shown(self.path)}: gives {out.shape}; expected one map, (1, 1, h, w)")
        found = (stretched(torch.from_numpy(out.reshape(out.shape[-2:]))).numpy() * 255).astype(np.uint8)
        back = Image.fromarray(found).resize(picture.size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(back)).float() / 255


def providers() -> list[str]:
    """What onnxruntime may run on: the GPU too, but for loader processes, which cannot share it."""
    import onnxruntime

    return [CPU] if get_worker_info() is not None else list(onnxruntime.get_available_providers())


def load_session(path: Path, on: list[str]) -> Any:
    """An onnxruntime session with one thread: the pictures are what is shared out. Raises DataError in one line."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=on)
    except Exception as error:  # onnxruntime has a dozen classes of its own
        raise DataError(f"{shown(path)}: no ONNX network ({first_line(error)})") from None
    shapes = [each.shape for each in session.get_inputs()]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise DataError(f"{shown(path)}: inputs {shapes}; expected one of (1, 3, h, w)")
    return session


class Rembg:
    """The package rembg with one of its models, mask only, without its clean-up."""

    def __init__(self, name: str, download: bool):
        if importlib.util.find_spec("rembg") is None:
            raise DataError("model=rembg: the package rembg is missing; pip install 'sightline[rembg]'")
        places = rembg_places(f"{name}.onnx")
        if not any(each.is_file() for each in places) and not download:
            raise DataError(
                f"rembg_model={name}: no file {shown(places[0])}; put it there, or let rembg fetch it with "
                f"data.download=true"
            )
        self.name = name
        self.session: Any = None

    def __call__(self, image: Tensor, index: int) -> Tensor:
        import rembg

        if self.session is None:
            try:
                self.session = rembg.new_session(self.name, providers=providers())
            except Exception as error:  # an unknown name, no network, a damaged file
                raise DataError(f"rembg_model={self.name}: {first_line(error)}") from None
        picture = image.permute(1, 2, 0).contiguous().numpy()
        found = rembg.remove(picture, only_mask=True, post_process_mask=False, session=self.session)
        return torch.from_numpy(np.array(found)).float() / 255


def rembg_places(file: str) -> list[Path]:
    """Where rembg looks for a network, in its older and in its newer versions."""
    old, new = ("~", ".u2net"), ("~", ".rembg")
    if said := os.environ.get("XDG_DATA_HOME"):
        old, new = (said, ".u2net"), (said, "rembg")
    homes = [os.environ.get("U2NET_HOME") or Path(*old)]
    homes.append(os.environ.get("U2NET_HOME") or os.environ.get("REMBG_HOME") or Path(*new))
    flat, nested = (Path(home).expanduser() for home in homes)
    return [flat / file, nested / "models" / Path(file).stem / file]


class Ready:
    """A folder of masks that another program made: ``segmentation_INDEX.pt`` or ``segmentation_INDEX.png``."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(f"model_path={shown(folder)}: no such folder")
        if not any(each.name.startswith("segmentation_") for each in os.scandir(folder)):
            raise DataError(f"model_path={shown(folder)}: no masks in it; expected segmentation_0.pt or .png, ...")
        self.folder = folder

    def __call__(self, image: Tensor, index: int) -> Tensor:
        from PIL import Image

        for path in (self.folder / f"segmentation_{index}.pt", self.folder / f"segmentation_{index}.png"):
            if path.is_file():
                break
        else:
            return torch.zeros(image.shape[1:])  # nothing found there
        if path.suffix == ".pt":
            found = read_published(path)
        else:
            try:
                found = torch.from_numpy(np.array(Image.open(path).convert("L")))
            except OSError as error:
                raise Unreadable(f"{shown(path)}: cannot be read ({error})") from None
        if found.shape != image.shape[1:]:
            size, wanted = (" x ".join(map(str, each)) for each in (found.shape, image.shape[1:]))
            raise DataError(f"{shown(path)}: {size} pixels, the pictures {wanted}; set image_size to the masks'")
        return found.float() / 255


def stretched(x: Tensor) -> Tensor:
    """To [0, 1]; zeros where all are equal."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


def build(model: str, model_path: Path | None, rembg_model: str, download: bool) -> Segmenter:
    if model == "contrast":
        return Contrast()
    if model == "rembg":
        return Rembg(rembg_model, download)
    assert model_path is not None
    return Onnx(model_path) if model == "onnx" else Ready(model_path)
