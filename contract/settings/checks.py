"""Checks that a ``__post_init__`` makes, in one line each."""

from __future__ import annotations

from typing import Any


class SettingsError(ValueError):
    """A configuration that cannot run. One line a problem, each naming the key, the value and what is valid."""


def at_least(settings: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < low:
            raise SettingsError(f"{name}={value}: must be at least {low}")


def above(settings: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= low:
            raise SettingsError(f"{name}={value}: must be above {low}")


def within(settings: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise SettingsError(f"{name}={value}: must lie in [{low}, {high}]")
