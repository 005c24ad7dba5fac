"""Processes and their children, as Linux shows them."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def _below() -> dict[int, list[int]]:
    """The children of every process. torchrun's lead sessions of their own, so that process groups miss them."""
    below: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
                below.setdefault(parent, []).append(int(entry.name))
    return below


def signal_tree(pid: int, number: int) -> None:
    """A signal to ``pid`` and all below it, from the top."""
    below, todo = _below(), [pid]
    while todo:
        each = todo.pop()
        todo += below.get(each, [])
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, number)


def kill_tree(pid: int) -> None:
    signal_tree(pid, signal.SIGKILL)


def listeners(pid: int, number: int) -> list[int]:
    """The first processes from ``pid`` down that have a handler for a signal, and so do not die of it. What is below
    one of them inherited the handler by a fork, and is not asked."""
    below, todo, found = _below(), [pid], []
    while todo:
        each = todo.pop()
        if _catches(each, number):
            found.append(each)
        else:
            todo += below.get(each, [])
    return found


def _catches(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError, IndexError, ValueError):
        mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(mask, 16) >> (number - 1) & 1)
    return False
