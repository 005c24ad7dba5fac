"""Which pictures: the group ``data``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from contract.settings.checks import SettingsError, at_least

EMBEDDED = ("digits", "fake", "digits_on_photos")  # need no data_path
SCENES = ("coco", "digits_on_photos", "voc")  # have boxes instead of a label
HAS_UNLABELLED = ("stl10",)


@dataclass(kw_only=True)
class Data:
    """``name`` is the file below ``workers/data/``. The root folder is the top-level key ``data_path``."""

    name: str = "digits"
    classes: int = 10  # 0: whatever the folder holds
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])  # per channel, of pixels in [0, 1]
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    fingerprint: str | None = None  # what is known of big data without reading it; enters the identity
    check: Literal["launch", "node"] = "launch"  # where a missing data_path is refused
    download: bool = False
    on_error: Literal["stop", "skip"] = "stop"  # a picture that cannot be read
    part: Literal["labelled", "unlabelled", "all"] = field(default="labelled", metadata={"absent": "labelled"})
    shorter_side: int | None = field(default=None, metadata={"absent": None})  # brought down to it before all else
    cache: str | None = None  # folder for decoded pictures; changes no pixel
    worker_affinity: bool = False  # loader processes on all cores of the job, whatever this process was pinned to
    size: int = 32  # of data=fake, in pixels
    length: int = 1600  # of data=fake, in pictures

    def __post_init__(self) -> None:
        at_least(self, 0, "classes")
        at_least(self, 1, "size", "length", "shorter_side")
        if self.part != "labelled" and self.name not in HAS_UNLABELLED:
            raise SettingsError(
                f"data.part={self.part}: of {', '.join(HAS_UNLABELLED)} only; {self.name} is all labelled"
            )
        for key in ("mean", "std"):
            if len(getattr(self, key)) != 3:
                raise SettingsError(f"data.{key}={getattr(self, key)}: expected three numbers, one per channel")
        if min(self.std) <= 0:
            raise SettingsError(f"data.std={self.std}: must be above 0")
