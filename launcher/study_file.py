"""``configs/study/NAME.yaml`` as a checked study. Every error names the file, the line and the key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from contract import study
from contract.settings.checks import SettingsError


def read(path: Path) -> study.Study:
    """Raises SettingsError: ``FILE:LINE: KEY: what is wrong``, a line for every problem."""
    try:
        text = path.read_text()
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        for key, line in _twice(tree):
            raise SettingsError(f"{path}:{line}: {key}: said twice")
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise SettingsError(f"{where}: not YAML: {what}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not text ({error.reason} at byte {error.start})") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected keys and values")
    try:
        return study.read(values)
    except SettingsError as error:
        lines = [f"{path}:{_line(tree, each)}: {each}" for each in str(error).splitlines()]
        raise SettingsError("\n".join(lines)) from None


def _line(tree: Any, message: str) -> int:
    """The line of the key that a message begins with, as deep as it can be followed. Names may hold dots."""
    node, rest, line = tree, message, 1
    while True:
        if isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if _starts(rest, str(pair[0].value))]
            if not found:
                return line
            key, node = max(found, key=lambda pair: len(str(pair[0].value)))
            line = key.start_mark.line + 1
            rest = rest[len(str(key.value)) :].removeprefix(".")
        elif isinstance(node, yaml.SequenceNode) and rest.startswith("["):
            number, _, rest = rest[1:].partition("]")
            if not number.isdigit() or int(number) >= len(node.value):
                return line
            node, rest = node.value[int(number)], rest.removeprefix(".")
            line = node.start_mark.line + 1
        else:
            return line


def _starts(message: str, key: str) -> bool:
    return message.startswith(key) and message[len(key) : len(key) + 1] in (".", "[", "=", ":", "")


def _twice(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if name in seen:
                yield name, key.start_mark.line + 1
            seen.add(name)
            yield from _twice(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for i, each in enumerate(node.value):
            yield from _twice(each, f"{prefix.removesuffix('.')}[{i}].")
