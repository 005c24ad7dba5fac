"""What the workers of residual networks share."""

from __future__ import annotations

from typing import Literal

from contract.settings.checks import SettingsError

Arch = Literal[
    "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "resnet10_slim",
]  # fmt: skip
NEW = "new:"  # before an Arch: in the place of an encoder, one that was never trained
Stem = Literal["imagenet", "cifar"]
Schedule = Literal["cosine", "steps"]


def check_milestones(milestones: list[int], schedule: str) -> None:
    if any(epoch < 1 for epoch in milestones) or milestones != sorted(set(milestones)):
        raise SettingsError(f"milestones={milestones}: expected epochs from 1 in rising order, such as [60,80]")
    if schedule == "steps" and not milestones:
        raise SettingsError("milestones=[]: schedule=steps lowers the rate at them; give some, or schedule=cosine")
