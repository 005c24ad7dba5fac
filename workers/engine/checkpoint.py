"""Atomic save and exact resume of anything with a ``state_dict``."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
import zipfile
from pathlib import Path
from typing import Any, Protocol

import torch

from contract.rundir import SAVED, Journal, sync_folder, write_json

from . import distributed

log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; one line for the user."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpoint:
    """``Checkpoint(path, journal, model=model, optimizer=optimizer)``: the parts, and how many steps they took.

    The newest file is ``path``, the one before it stands beside it as ``*.previous.pt`` and is used when the newest is
    damaged. Only rank 0 writes; it also keeps the length of the metrics journal, which is cut back to it on resume.
    """

    def __init__(self, path: Path, journal: Journal | None = None, **parts: Stateful):
        self.path, self.previous = path, path.with_suffix(".previous.pt")
        self.journal, self.parts = journal, parts

    def save(self, step: int) -> None:
        """Raises CheckpointError (disk full, ...) and then leaves the older files as they were."""
        if distributed.rank():
            return
        began = time.monotonic()
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "offset": self.journal.sync() if self.journal else 0}
        partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            with zipfile.ZipFile(partial) as archive:  # the sums of all tensors, before the older file gives way
                if archive.testzip() is not None:
                    raise OSError("what was written does not read back")
            if self.path.exists():
                self.path.replace(self.previous)
            partial.replace(self.path)
            sync_folder(self.path.parent)
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.path}: cannot save step {step} ({_reason(error)}); the checkpoint before it is untouched: "
                f"make room, then retry"
            ) from error
        # Whoever watches the clock leaves as much time before the limit.
        with contextlib.suppress(OSError):
            write_json(self.path.with_name(SAVED), {"seconds": round(time.monotonic() - began, 3)}, sync=False)

    def restore(self) -> int:
        """The step to go on from; 0 where there is no checkpoint. Raises CheckpointError where none can be read."""
        chosen, state = distributed.from_first(self._choose() if distributed.rank() == 0 else None), None
        if chosen is None:
            if self.journal:
                self.journal.cut(0)
            return 0
        state = torch.load(chosen, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        if self.journal:
            self.journal.cut(int(state["offset"]))
        log.info("resumed from step %d of %s", state["step"], chosen)
        return int(state["step"])

    def _choose(self) -> str | None:
        """The newest file that reads whole."""
        damaged = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is None:
                        return str(path)
            except (OSError, zipfile.BadZipFile):
                pass
            damaged.append(str(path))
            log.warning("%s: damaged, passed over", path)
        if damaged:
            raise CheckpointError(f"{' and '.join(damaged)}: damaged; delete to start this run again from step 0")
        return None


def _reason(error: BaseException) -> str:
    """torch wraps a full disk into a RuntimeError about its archive; say what the system said."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.__cause__ or error.__context__
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
