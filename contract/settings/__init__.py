"""The typed settings of every worker: one keyword-only dataclass a file, ``contract/settings/<worker>.py``.

The launcher checks a configuration with them on the login node; the worker reads its ``config.yaml`` into the same
class. What is checked here can no longer fail on the node.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from contract.settings.checks import SettingsError, above, at_least
from contract.settings.data import SCENES, Data
from contract.settings.env import Env
from contract.settings.resnet import NEW

T = TypeVar("T")

NOT_SCIENCE = frozenset(
    {
        # where things are, and what they are called
        "output_dir", "job_name", "data_path", "then", "resume",
        # where and how it runs
        "env", "data.check", "data.download", "data.cache", "data.worker_affinity", "data.fingerprint",
        # what is written down on the way
        "log_every", "checkpoint_minutes", "checkpoint_epochs", "cache_gb",
    }
)  # fmt: skip
"""The keys, dotted, that cannot change a result. Everything else is science: it makes the identity of a run.
``batch_size`` and ``accum_iter`` are folded into the effective batch, see ``Stepping.science``."""

NOT_WORKERS = frozenset({"__init__", "checks", "data", "env", "features", "views", "resnet", "detection"})
"""The files beside this one that are no worker's settings."""


@dataclass(kw_only=True)
class Settings:
    """What every worker is told. ``worker`` is the file's name below ``workers/``."""

    takes_boxes: ClassVar[bool] = False  # pictures with boxes, and no others

    worker: str
    seed: int = 0
    output_dir: str = "runs"
    job_name: str | None = None
    data_path: str | None = None
    resume: bool = True
    then: list[str] = field(default_factory=list)
    smoke: int | None = field(default=None, metadata={"absent": None})  # steps, and batches evaluated: no result
    data: Data = field(default_factory=Data)
    env: Env = field(default_factory=Env)

    def __post_init__(self) -> None:
        at_least(self, 0, "seed")
        at_least(self, 1, "smoke")
        if self.takes_boxes != (self.data.name in SCENES):
            kind = f"with boxes: {', '.join(SCENES)}" if self.takes_boxes else "with labels, not with boxes"
            raise SettingsError(f"data={self.data.name}: {self.worker} takes pictures {kind}")
        if (encoder := str(getattr(self, "encoder", ""))).startswith(NEW) and not self.takes_boxes:
            raise SettingsError(
                f"encoder={encoder}: for detection only; elsewhere take a pretraining run with epochs=0"
            )

    def science(self) -> dict[str, Any]:
        """The settings that make the identity, as plain data. A key that was added after runs existed carries
        ``metadata={"absent": value}``: at that value it is left out, so that older identities stay what they are."""
        return _science(self, "")


@dataclass(kw_only=True)
class Stepping(Settings):
    """What every worker that trains by steps is told. ``batch_size`` is per process, as in the MAE family."""

    batch_size: int = 64
    accum_iter: int | None = None
    effective_batch_size: int | None = None
    blr: float = 1e-3
    lr: float | None = None
    weight_decay: float = 0.05
    clip_grad: float | None = None
    amp: Literal["none", "bf16", "fp16"] = "none"
    log_every: int = 20
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "blr", "lr", "weight_decay", "checkpoint_minutes")
        at_least(self, 1, "batch_size", "accum_iter", "effective_batch_size", "log_every")
        above(self, 0, "clip_grad")

    @property
    def local_batch_matters(self) -> bool:
        """Whether the batch of one process, and not only the sum over all, is part of the method."""
        return False

    def resolve_batch(self, processes: int, explicit: Iterable[str] = ()) -> None:
        """Settle ``accum_iter`` and ``effective_batch_size`` for the processes at hand.

        What was said on the command line (``explicit``) wins over what a file says; both said there and unequal, or a
        size that does not divide, raises SettingsError.
        """
        explicit = set(explicit)
        per_step = self.batch_size * processes
        accum, effective = self.accum_iter, self.effective_batch_size
        if accum is not None and effective is not None and accum * per_step != effective:
            if {"accum_iter", "effective_batch_size"} <= explicit or not explicit & {
                "accum_iter",
                "effective_batch_size",
            }:
                raise SettingsError(
                    f"accum_iter={accum}: {accum} x batch_size {self.batch_size} x {processes} processes = "
                    f"{accum * per_step}, but effective_batch_size={effective}; give one of the two"
                )
            accum, effective = (accum, None) if "accum_iter" in explicit else (None, effective)
        if accum is None and effective is not None:
            if effective % per_step:
                raise SettingsError(
                    f"effective_batch_size={effective}: not a multiple of batch_size {self.batch_size} x {processes} "
                    f"processes = {per_step}; change batch_size or the number of processes"
                )
            accum = effective // per_step
        self.accum_iter = accum or 1
        self.effective_batch_size = self.accum_iter * per_step

    @property
    def peak_lr(self) -> float:
        """``lr``, or ``blr`` scaled linearly to the effective batch (per 256 pictures, as in the MAE family)."""
        if self.lr is not None:
            return self.lr
        assert self.effective_batch_size is not None, "resolve_batch comes first"
        return self.blr * self.effective_batch_size / 256

    def science(self) -> dict[str, Any]:
        found = super().science()
        found.pop("accum_iter")  # the effective batch says it
        if not self.local_batch_matters:
            found.pop("batch_size")
        return found


@dataclass(kw_only=True)
class Training(Stepping):
    """What every worker that trains for a number of epochs is told."""

    epochs: int = 100
    warmup_epochs: float = 0
    checkpoint_epochs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "epochs", "warmup_epochs")
        at_least(self, 1, "checkpoint_epochs")
        if self.epochs and self.warmup_epochs > self.epochs:
            raise SettingsError(f"warmup_epochs={self.warmup_epochs}: longer than epochs={self.epochs}")


# -- reading -----------------------------------------------------------------------------------------------------------


@functools.cache
def workers() -> list[str]:
    """The names that ``worker=`` takes."""
    folder = Path(__file__).parent
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in NOT_WORKERS)


@functools.cache
def of(worker: str) -> type[Settings]:
    """The settings class of a worker. Raises SettingsError, listing the workers there are."""
    if worker not in workers():
        raise SettingsError(unknown("worker", worker, workers()))
    found: type[Settings] = importlib.import_module(f"contract.settings.{worker}").Settings
    return found


def read(values: Mapping[str, Any]) -> Settings:
    """Plain data -> the checked settings of ``values["worker"]``. Raises SettingsError, a line for every problem."""
    worker = values.get("worker")
    if not isinstance(worker, str):
        raise SettingsError(f"worker={worker}: missing; choose one of {', '.join(workers())}")
    return build(of(worker), values)


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Fill a dataclass of settings from plain data, checking names and types at every level."""
    problems: list[str] = []
    kwargs: dict[str, Any] = {}
    known, hints = _fields(cls), _hints(cls)
    for key, value in values.items():
        if key not in known:
            problems.append(unknown_key(f"{prefix}{key}", cls, prefix))
            continue
        try:
            kwargs[key] = coerce(value, hints[key], f"{prefix}{key}")
        except SettingsError as error:
            problems.append(str(error))
    for key, each in known.items():
        if key not in values and each.default is MISSING and each.default_factory is MISSING:
            problems.append(f"{prefix}{key}: missing")
    if problems:
        raise SettingsError("\n".join(problems))
    return cls(**kwargs)


def unknown_key(key: str, cls: Any, prefix: str = "") -> str:
    return unknown("", key, [prefix + name for name in _fields(cls)])


def unknown(key: str, value: str, valid: Iterable[str]) -> str:
    """``epochz: unknown key; did you mean epochs? valid: ...`` in one line."""
    valid = list(valid)
    close = difflib.get_close_matches(value, valid, n=1)
    what = f"{key}={value}: unknown" if key else f"{value}: unknown key"
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"{what}{hint} valid: {', '.join(valid)}"


def _fields(cls: Any) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(cls)}


_HINTS: dict[Any, dict[str, Any]] = {}  # a thousand configurations are checked in one launch


def _hints(cls: Any) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(hint), typing.get_args(hint)


def coerce(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the annotated type; an int serves as a float, and so does ``1e-3``, which is text to YAML 1.1."""
    origin, args = _parts(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        if len(rest) == 1:
            return coerce(value, rest[0], key)
        for each in rest:
            try:
                return coerce(value, each, key)
            except SettingsError:
                continue
    elif origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise SettingsError(unknown(key, str(value), [str(a) for a in args]))
    elif origin is list:
        if isinstance(value, (list, tuple)):
            return [coerce(v, args[0], f"{key}[{i}]") for i, v in enumerate(value)]
    elif origin is dict:
        if isinstance(value, Mapping):
            return {coerce(k, args[0], key): coerce(v, args[1], f"{key}.{k}") for k, v in value.items()}
    elif is_dataclass(hint):
        assert isinstance(hint, type)
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return build(hint, value, f"{key}.")
    elif hint is Any:
        return value
    elif hint is float:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise SettingsError(f"{key}={value}: expected a finite number")
            return float(value) + 0.0  # -0.0 is 0.0, in an identity too
    elif hint is int:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)  # job_name=5
    raise SettingsError(f"{key}={value}: expected {_spell(hint)}, got {type(value).__name__}")


def _spell(hint: Any) -> str:
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _spell(a) for a in args)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, args))
    if typing.get_origin(hint) is list:
        return f"a list [{_spell(args[0])}, ...]"
    if is_dataclass(hint):
        return "a group of keys"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def plain(settings: Any) -> Any:
    """Settings as nested plain data, in the order of the fields: what ``config.yaml`` holds."""
    if is_dataclass(settings):
        return {f: plain(getattr(settings, f)) for f in _fields(type(settings))}
    if isinstance(settings, list):
        return [plain(v) for v in settings]
    return settings


def _science(settings: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in _fields(type(settings)).items():
        key, value = prefix + name, getattr(settings, name)
        if key in NOT_SCIENCE or ("absent" in each.metadata and value == each.metadata["absent"]):
            continue
        found[name] = _science(value, f"{key}.") if is_dataclass(value) else value
    return found
