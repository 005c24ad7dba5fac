"""How salient each pixel of each picture is: maps that ``worker=main_simclr saliency_path=RUN`` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contract.settings import Settings as Shared
from contract.settings.checks import SettingsError, at_least


@dataclass(kw_only=True)
class Settings(Shared):
    """One run is one split, ``data.part`` of it."""

    split: Literal["train", "val"] = "train"
    method: Literal["spectral_residual", "contrast", "opencv", "resnet", "onnx"] = "spectral_residual"
    network: str | None = None  # of method=resnet an encoder, of method=onnx a file
    network_size: int | None = None  # side of the pictures that method=onnx gets; null: image_size
    image_size: int = 28  # of the maps, as of the pictures that are trained on
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "image_size", "network_size", "batch_size")
        takes = self.method in ("resnet", "onnx")
        if takes and self.network is None:
            what = "an encoder of ours, or another's file" if self.method == "resnet" else "a file"
            raise SettingsError(f"network=null: method={self.method} needs one; give {what}")
        if self.network is not None and not takes:
            raise SettingsError(f"network={self.network}: method={self.method} has none; choose resnet or onnx")
        if self.network_size is not None and self.method != "onnx":
            raise SettingsError(f"network_size={self.network_size}: of method=onnx only")
