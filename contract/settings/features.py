"""What an evaluation reads off a frozen encoder, and which heads it trains on that."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Literal

from contract.settings.checks import SettingsError, at_least

Vector = Literal[
    "cls", "gap", "both", "cp1", "cp2", "cp3", "cp4", "ca1", "ca2", "ca3", "ca4", "attn-mn", "attn-lcte", "dino"
]  # fmt: skip
"""Poolings without parameters; ``workers/pooling/tokens.py`` defines them."""
Features = Literal[Vector, "abmilp"]
"""Those, and the trained one of ``workers/pooling/abmilp.py``."""
Optimizer = Literal["lars", "sgd"]
FORM = "FEATURES[@BLOCK][:BLR][:OPTIMIZER], such as gap, abmilp:0.05, cls@-2:0.1:lars"


@dataclass(kw_only=True)
class AbMILP:
    """The published headline's head is the default; the published program's own is tanh, depth 2, both, all."""

    act: Literal["relu", "tanh"] = "relu"  # between the scorer's layers
    depth: int = 1  # the scorer's linear layers
    sa: Literal["none", "map", "both"] = "none"  # self-attention before the scorer, or before the mean too
    cond: Literal["none", "pe"] = "none"  # pe: the scorer sees a fixed table of positions
    content: Literal["patch", "all"] = "patch"  # all: the class token takes part

    def __post_init__(self) -> None:
        at_least(self, 1, "depth")


@dataclass(frozen=True, kw_only=True)
class Head:
    """One classifier of several; what is None is as the settings say."""

    features: str
    block: int | None = None
    blr: float | None = None
    optimizer: str | None = None

    @property
    def name(self) -> str:
        """What its metrics are called after: what was said about it."""
        block = "" if self.block is None else f"_b{self.block}"
        rate = "" if self.blr is None else f"_lr{self.blr:g}".replace("+", "")
        return f"{self.features}{block}{rate}" + ("" if self.optimizer is None else f"_{self.optimizer}")


def head(said: str) -> Head:
    """``cls@-2:0.1:lars`` -> a head. Raises SettingsError, saying what is valid."""
    first, *rest = said.split(":")
    features, at, block = first.partition("@")
    found: dict[str, float | str] = {}
    for each in rest:
        key, value = _rate_or_optimizer(said, each)
        if key in found:
            raise SettingsError(f"heads={said}: two of {key}; expected {FORM}")
        found[key] = value
    if features not in typing.get_args(Features):
        raise SettingsError(f"heads={said}: no pooling {features!r}; valid: {', '.join(typing.get_args(Features))}")
    if at and not block.removeprefix("-").isdecimal():
        raise SettingsError(f"heads={said}: no block {block!r}; expected {FORM}")
    return Head(features=features, block=int(block) if at else None, **found)  # type: ignore[arg-type]


def _rate_or_optimizer(said: str, text: str) -> tuple[str, float | str]:
    if text in typing.get_args(Optimizer):
        return "optimizer", text
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise SettingsError(f"heads={said}: {text!r} is neither a rate nor one of lars, sgd; expected {FORM}")
    return "blr", rate


def all_heads(said: list[str]) -> list[Head]:
    """Raises SettingsError, also where two heads would have one name."""
    found = [head(each) for each in said]
    names = [each.name for each in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"heads=[{','.join(said)}]: twice the same: {', '.join(twice)}")
    return found


def check_oracle(oracle: str | None, features: set[str]) -> None:
    """``dino`` pools by the attention of a second encoder, which nothing else reads."""
    if oracle is None and "dino" in features:
        raise SettingsError("oracle=null: features=dino weighs patches by another encoder's attention; give oracle=")
    if oracle is not None and "dino" not in features:
        raise SettingsError(f"oracle={oracle}: read by features=dino only; leave it out")


def check_few(shots: int | None, fraction: float | None) -> None:
    """Low-shot training sets: ``shots`` pictures of each class, or a ``fraction`` of each."""
    if shots is not None and fraction is not None:
        raise SettingsError(f"shots={shots}, fraction={fraction}: give one of the two")
    if shots is not None and shots < 1:
        raise SettingsError(f"shots={shots}: must be at least 1")
    if fraction is not None and not 0 < fraction <= 1:
        raise SettingsError(f"fraction={fraction}: must lie in (0, 1]")
