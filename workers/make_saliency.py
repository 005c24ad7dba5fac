"""How salient each pixel of each picture is: ``saliency.npy``, (n, 1, side, side) float16 in the order of the split.

``method``: the spectral residual of the log spectrum (Hou and Zhang, CVPR 2007), which needs no network, by us or by
OpenCV's contrib modules; ``contrast`` in colour with a bias to the centre; ``resnet``, the norms of a network's maps,
stages 2 to 4 weighted 1, 2, 1 (the alternative in the program of Wang et al., SVRHM 2021); ``onnx``, any saliency
model, such as FastSal, exported by its owner. All but the last have mean 0 and standard deviation 1 in each map.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from contract import rundir
from contract.settings.make_saliency import Settings
from workers.data import DataError, fingerprint
from workers.data.maps import ABOUT, FILE
from workers.engine import distributed, pictures
from workers.engine.encoder import EncoderError, load_encoder
from workers.engine.run import open_run
from workers.models.resnet import ResNet
from workers.transforms import saliency, spectral
from workers.transforms.crops import ResizeCenterCrop

Method = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1], on the device -> maps (B, 1, H, W)."""
STAGES = {2: 1.0, 3: 2.0, 4: 1.0}  # and their weights


def method(settings: Settings) -> Method:
    if settings.method == "spectral_residual":
        return spectral.residual
    if settings.method == "contrast":
        return saliency.contrast
    if settings.method == "opencv":
        return _opencv()
    assert settings.network is not None
    return _resnet(settings) if settings.method == "resnet" else _onnx(settings)


def _resnet(settings: Settings) -> Method:
    assert settings.network is not None
    encoder = load_encoder(settings.network)
    if not isinstance(encoder, ResNet):
        raise EncoderError(f"network={settings.network}: a {encoder.name}; method=resnet takes residual networks")
    prepare = pictures.normaliser(settings, encoder)

    @torch.no_grad()
    def found(images: Tensor) -> Tensor:
        x, size = prepare(images * 255), images.shape[-2:]
        norms = [
            share
            * F.interpolate(encoder.map(x, stage).norm(dim=1, keepdim=True), size, mode="bilinear", align_corners=True)
            for stage, share in STAGES.items()
        ]
        return spectral.standardised(torch.stack(norms).sum(0))

    return found


def _onnx(settings: Settings) -> Method:
    try:
        import onnxruntime
    except ImportError:
        raise EncoderError("method=onnx: needs the package onnxruntime; pip install onnxruntime") from None
    try:
        session: Any = onnxruntime.InferenceSession(settings.network, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has errors of its own
        raise EncoderError(f"network={settings.network}: unreadable ({str(error).splitlines()[0]})") from None
    side, name = settings.network_size or settings.image_size, session.get_inputs()[0].name

    def found(images: Tensor) -> Tensor:
        x = F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)
        out = torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])
        if out.ndim != 4 or out.shape[:2] != (len(images), 1):
            raise EncoderError(f"network={settings.network}: gave {tuple(out.shape)}, expected (B, 1, H, W)")
        return F.interpolate(out.float(), images.shape[-2:], mode="bilinear", align_corners=False)

    return found


def _opencv() -> Method:
    try:
        import cv2

        model = cv2.saliency.StaticSaliencySpectralResidual_create()
    except (ImportError, AttributeError):
        raise EncoderError(
            "method=opencv: needs OpenCV's contrib modules; pip install 'sightline[saliency]', or "
            "method=spectral_residual"
        ) from None

    def found(images: Tensor) -> Tensor:
        maps = []
        for picture in (images * 255).byte().permute(0, 2, 3, 1).cpu().numpy():
            done, each = model.computeSaliency(np.ascontiguousarray(picture[..., ::-1]))
            if not done:
                raise DataError("method=opencv: a picture has no spectral residual")
            maps.append(torch.from_numpy(each))
        return spectral.standardised(torch.stack(maps)[:, None].float())

    return found


def main() -> None:
    with open_run(Settings) as run:
        settings = run.settings
        shown = pictures.load(settings, settings.split, labelled=settings.split == "val")
        loader = pictures.in_order(
            settings, shown, ResizeCenterCrop(settings.image_size, crop=1.0), settings.batch_size
        )
        saliency_of, partial = method(settings), run.folder / f".{FILE}"
        shape = (len(shown), 1, settings.image_size, settings.image_size)
        if distributed.rank() == 0:
            np.lib.format.open_memmap(partial, "w+", np.float16, shape).flush()
        distributed.barrier()
        maps = np.lib.format.open_memmap(partial, "r+")
        bad = torch.zeros(2, device=distributed.device())
        for images, _, index in loader:
            found = saliency_of(images.to(distributed.device()).float() / 255)
            bad[0] += (found.flatten(1).amax(1) == found.flatten(1).amin(1)).sum().to(bad)
            bad[1] += (~found.isfinite().flatten(1).all(1)).sum().to(bad)
            maps[index.numpy()] = found.clamp(-65504, 65504).half().cpu().numpy()
            if run.stop():
                return
        maps.flush()
        flat, broken = (int(each) for each in distributed.total(bad))
        if broken or flat == len(shown):
            raise DataError(
                f"method={settings.method}: of {len(shown)} maps {broken} are not finite and {flat} are flat; look at "
                "the pictures, or choose another method"
            )
        if distributed.rank() == 0:
            partial.replace(run.folder / FILE)
            about = {
                "fingerprint": fingerprint(shown),
                "data": settings.data.name,
                "split": settings.split,
                "part": settings.data.part,
                "method": settings.method,
                "image_size": settings.image_size,
            }
            rundir.write_atomic(run.folder / ABOUT, json.dumps(about, indent=1).encode())
        metrics = {"saliency/pictures": float(len(shown)), "saliency/flat": float(flat)}
        run.track(1, 1, metrics)
        run.finish(metrics, 1)


if __name__ == "__main__":
    main()
