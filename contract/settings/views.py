"""How views of a picture are made: SimCLR's, and those after how eyes see."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from contract.settings.checks import SettingsError, above, at_least, within

Augment = Literal[
    "none", "simclr", "foveation", "magnification", "exponential", "salient_magnification", "saliency_crop",
    "uniform_crop",
]  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    "none": {"crop": "none", "blur": False, "hflip": 0.0, "jitter_prob": 0.0, "gray_prob": 0.0},
    "simclr": {},
    "foveation": {"crop": "none", "blur": False, "foveation": True},
    "magnification": {"crop": "none", "magnification": "quadratic"},
    "exponential": {"crop": "none", "magnification": "exponential"},
    "salient_magnification": {"crop": "none", "magnification": "quadratic", "fixations": "salient"},
    "saliency_crop": {"crop": "salient"},
    "uniform_crop": {"crop": "uniform"},
}
"""What ``augment`` says of the keys that are null; of what it does not mention, ``SIMCLR`` says it."""
SIMCLR: dict[str, Any] = {
    "crop": "random",
    "blur": True,
    "foveation": False,
    "magnification": "none",
    "fixations": "uniform",
    "hflip": 0.5,
    "jitter_prob": 0.8,
    "gray_prob": 0.2,
}


@dataclass(kw_only=True)
class Views:
    """Beside the settings of a worker, which calls ``check_views``.

    Lengths in pixels that are null are the published ones for pictures of 96 pixels, in proportion.
    """

    augment: Augment = "simclr"
    # null: as augment says
    crop: Literal["none", "random", "salient", "uniform"] | None = None
    foveation: bool | None = None
    blur: bool | None = None
    magnification: Literal["none", "quadratic", "exponential"] | None = None
    fixations: Literal["uniform", "salient"] | None = None  # of the magnification
    hflip: float | None = None
    jitter_prob: float | None = None
    gray_prob: float | None = None
    jitter: float = 1.0  # times 0.8 of brightness, contrast and saturation, and 0.2 of hue
    min_crop: float = 0.08
    crop_temperature: float = 1.5
    crop_border: int = 0
    crop_pad: bool = False  # black beyond the picture; else cut off
    published_crop: bool = False  # cut off as the published program does
    fovea_area: list[float] = field(default_factory=lambda: [0.01, 0.5])
    blur_growth: float = 0.06  # sigma in units of the eccentricity
    ring_spacing: float = 0.2
    fovea_border: int | None = None
    cover_ratio: list[float] = field(default_factory=lambda: [0.05, 0.7])
    fov_size: float | None = None
    fov_fall: float | None = None  # published: K
    slope: list[float] = field(default_factory=lambda: [1.5])
    sample_temperature: float = 1.5
    sample_border: int | None = None
    still_maps: bool = False  # saliency maps do not follow flips and crops, as published

    def check_views(self) -> None:
        within(self, 0, 1, "hflip", "jitter_prob", "gray_prob", "min_crop", "blur_growth")
        within(self, 0, 1.25, "jitter")
        above(self, 0, "crop_temperature", "sample_temperature", "blur_growth", "fov_size")
        at_least(self, 0, "crop_border", "fovea_border", "sample_border", "fov_fall")
        at_least(self, 0.01, "ring_spacing")
        for key, most in (("fovea_area", 1), ("cover_ratio", 100), ("slope", 100)):
            values = getattr(self, key)
            if len(values) not in (1, 2) or not 0 < values[0] <= values[-1] <= most:
                raise SettingsError(f"{key}={values}: expected [VALUE] or [LOW,HIGH], above 0, at most {most}")

    def view_options(self) -> dict[str, Any]:
        """What ``workers.transforms.views.build`` takes, with nothing left that ``augment`` says."""
        said = {each.name: getattr(self, each.name) for each in fields(Views) if each.name != "augment"}
        parts = {**SIMCLR, **PARTS[self.augment]}
        return {key: parts[key] if value is None and key in parts else value for key, value in said.items()}

    @property
    def needs_maps(self) -> bool:
        """Whether views look where saliency maps say."""
        o = self.view_options()
        return bool(o["crop"] == "salient" or (o["magnification"] != "none" and o["fixations"] == "salient"))
