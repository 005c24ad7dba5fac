"""Where and how a run is executed: the group ``env``. Nothing in it can change a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contract.settings.checks import SettingsError, at_least


@dataclass(kw_only=True)
class Env:
    scheduler: Literal["local", "slurm", "lsf"] = "local"
    slurm: bool = False  # env.slurm=True is short for env.scheduler=slurm
    lsf: bool = False
    ngpu: int | None = None  # per node; null: the visible ones here, 1 on a scheduler
    nproc: int | None = None  # processes per node; null: one per GPU, or one
    nodes: int = 1
    distributed: bool | None = None  # accepted from the published command lines, and only checked
    threads: int | None = None  # CPU threads per process; null: the cores shared out
    workers: int = 0  # loader processes per process
    max_parallel: int | None = None  # runs side by side; null: as many as there are cores (here), no limit (scheduler)
    grace_s: int = 120  # from a request to leave to the kill

    def __post_init__(self) -> None:
        at_least(self, 0, "ngpu", "workers")
        at_least(self, 1, "nproc", "nodes", "threads", "max_parallel", "grace_s")
        asked = {name for name in ("slurm", "lsf") if getattr(self, name)}
        if self.scheduler != "local":
            asked.add(self.scheduler)
        if len(asked) > 1:
            raise SettingsError(f"env: asks for {' and '.join(sorted(asked))} at once; choose one scheduler")
        for name in asked:
            self.scheduler = name  # type: ignore[assignment]  # one of the Literal's values
        if self.ngpu and self.nproc and self.nproc > self.ngpu:
            raise SettingsError(f"env.nproc={self.nproc}: more processes than env.ngpu={self.ngpu} GPUs")

    @property
    def processes_per_node(self) -> int:
        return self.nproc or max(self.ngpu or 0, 1)

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node
