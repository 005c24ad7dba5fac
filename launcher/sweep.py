"""From ``key=value`` words to plain configurations. Hydra's grammar and composition; no Hydra beyond this file.

Composing costs some 50 ms, patching a dict a few µs. So groups are composed once per choice, and every other value,
fixed or swept, is patched into the composed and still *unresolved* dict; interpolations are resolved last.
"""

from __future__ import annotations

import functools
import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, RangeSweep, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import contract.settings
from contract.settings.checks import SettingsError
from launcher import CONFIGS

ALIASES = {"dataset": "data"}
NOT_GROUPS = {"study"}

Said = dict[str, Any]
"""One choice for every key that was said, in the order in which they were said."""


@functools.cache
def groups() -> frozenset[str]:
    return frozenset(d.name for d in CONFIGS.iterdir() if d.is_dir() and d.name[0] not in "._") - NOT_GROUPS


@functools.cache
def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


# -- the words --------------------------------------------------------------------------------------------------------


def points(words: Sequence[str]) -> list[Said]:
    """Every combination of what the words sweep over, the last word varying fastest. Raises SettingsError."""
    problems: list[str] = []
    keys: list[str] = []
    values: list[list[Any]] = []
    for word in words:
        try:
            key, some = _word(word)
        except SettingsError as error:
            problems.append(str(error))
            continue
        if key in keys and values[keys.index(key)] != some:
            problems.append(f"{word}: {key} was given before, as {_show(values[keys.index(key)])}")
        elif key not in keys:
            keys.append(key)
            values.append(some)
    if problems:
        raise SettingsError("\n".join(problems))
    return [dict(zip(keys, each, strict=True)) for each in itertools.product(*values)]


def _word(word: str) -> tuple[str, list[Any]]:
    try:
        override = _parser().parse_override(word)
        if override.is_delete():
            raise SettingsError(f"{word}: keys cannot be taken away; set a value instead, null for none")
        if override.package is not None or override.is_hydra_override():
            raise SettingsError(f"{word}: not supported; say key=value, or group=NAME for {_list(sorted(groups()))}")
        some = _values(override)
    except HydraException as error:
        key, _, value = word.partition("=")
        reason = " ".join(str(error).split()).rstrip(".")
        quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
        raise SettingsError(f"{word}: {reason}; an unusual value needs quotes: {shlex.quote(quoted)}") from None
    return _alias(override.key_or_group), some


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    if override.value_type in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP):
        raise SettingsError(f"{override.input_line}: not enumerable; sweep with commas, a=1,2, or a=range(3)")
    found = [Override._convert_value(v) for v in override.sweep_iterator()]
    if isinstance(override._value, RangeSweep):
        # range(0,1,0.1) counts up to 0.7000000000000001, another experiment than tau=0.7.
        found = [float(f"{v:.12g}") if isinstance(v, float) else v for v in found]
    return found


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _alias(key: str) -> str:
    first, dot, rest = key.partition(".")
    if first in contract.settings.workers() and dot:
        return f"{first}.{_alias(rest)}"
    return ALIASES.get(first, first) + dot + rest


# -- composing --------------------------------------------------------------------------------------------------------


def compose(
    said: Mapping[str, Any], config_name: str = "config", shared: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The whole configuration as plain data; ``shared`` values, of an earlier stage, give way to what was said.

    Raises SettingsError for a choice that does not exist, but does not know which keys a worker takes:
    contract.settings does.
    """
    chosen: dict[str, str | None] = {}
    patches: dict[str, Any] = {}
    for key, value in said.items():
        key = _alias(key)
        if key not in groups():
            patches[key] = value
        elif value is None or value in choices(key):
            chosen[key] = value
        else:
            raise SettingsError(contract.settings.unknown(key, str(value), choices(key)))
    choice = tuple(sorted(chosen.items()))
    values = _base(config_name, choice)
    values = {**values, **{k: v for k, v in (shared or {}).items() if k not in chosen}}
    for key, value in patches.items():
        values = _patch(values, key.split("."), value, key)
    if _base_interpolated(config_name, choice) or _interpolated([*patches.values()]):
        values = _resolve(values)
    return {k: v for k, v in values.items() if v != "???"}  # a missing value is a missing key, and refused as one


@functools.cache
def _base(config_name: str, chosen: tuple[tuple[str, str | None], ...]) -> dict[str, Any]:
    names = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    if config_name not in names:
        raise SettingsError(contract.settings.unknown("--config-name", config_name, names))
    words = [f"{k}={'null' if v is None else v}" for k, v in chosen]
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            found = OmegaConf.to_container(hydra_compose(config_name, words), resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        if "worker" not in dict(chosen) and "You must specify 'worker'" in text:
            raise SettingsError(f"worker: missing; choose one of worker={_list(choices('worker'))}") from None
        raise SettingsError(f"{CONFIGS / config_name}.yaml {' '.join(words)}: {text}") from None
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


@functools.cache
def _base_interpolated(config_name: str, chosen: tuple[tuple[str, str | None], ...]) -> bool:
    return _interpolated(_base(config_name, chosen))


def _patch(values: Mapping[str, Any], path: Sequence[str], value: Any, key: str) -> dict[str, Any]:
    """A copy of ``values`` with one value changed; what did not change is shared."""
    if len(path) == 1:
        return {**values, path[0]: value}
    inner = values.get(path[0], {})
    if not isinstance(inner, Mapping):
        raise SettingsError(f"{key}={value}: {path[0]} is a value ({inner}), not a group of keys")
    return {**values, path[0]: _patch(inner, path[1:], value, key)}


def _interpolated(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_interpolated, value.values()))
    if isinstance(value, list):
        return any(map(_interpolated, value))
    return isinstance(value, str) and "${" in value


def _resolve(values: dict[str, Any]) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise SettingsError(" ".join(str(error).split())) from None
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "(none)"


def _show(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))
