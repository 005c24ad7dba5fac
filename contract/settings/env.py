"""Where and how a run is executed: the group ``env``. Nothing in it can change a result."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from contract.settings.checks import SettingsError, above, at_least


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
    stall_min: float | None = 30.0  # minutes without a sign of life after which an attempt is ended; null: never
    # For a scheduler; null leaves it to the site.
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    comment: str | None = None
    cpus: int | None = None  # cores per process; null: threads, or one, and one for each loader process
    mem_gb: float | None = None  # per node
    timeout_min: int | None = None  # of one attempt; a run goes on in the next
    signal_s: int = 120  # from the warning to the time limit
    max_submit: int | None = None  # jobs of yours that the site takes at once; null: as its accounting says
    max_requeue: int = 5  # attempts in a row without a new step; then it gives up
    pack: int = 1  # runs side by side in one allocation
    canary: bool = True  # a launch of more than canary_above runs sends one element first, at smoke scale
    canary_above: int = 20
    breaker: int = 3  # the first so many runs that end with the same error hold the rest; 0: never
    setup: list[str] = field(default_factory=list)  # shell lines before the run
    gpu_model: str | None = None
    container: str | None = None  # image
    container_by: Literal["pyxis", "apptainer"] = "pyxis"  # on Slurm; on LSF it is docker
    mounts: list[str] = field(default_factory=list)  # FROM:TO, for the container
    shm_gb: float | None = None  # the docker container's shared memory, which loader processes need
    network: str | None = None  # the docker container's network, ipc and entrypoint
    ipc: str | None = None
    entrypoint: str | None = None
    job_group: str | None = None  # LSF's -g
    python: str | None = None  # the interpreter on the nodes; null: this one
    vars: dict[str, str] = field(default_factory=dict)  # environment variables of the job
    extra: dict[str, Any] = field(
        default_factory=dict
    )  # options of the scheduler by name; true: a flag, null: not even ours

    def __post_init__(self) -> None:
        at_least(self, 0, "ngpu", "workers")
        at_least(self, 1, "nproc", "nodes", "threads", "max_parallel", "grace_s")
        at_least(self, 1, "cpus", "mem_gb", "timeout_min", "max_submit")
        above(self, 0, "shm_gb", "stall_min")
        at_least(self, 0, "signal_s", "max_requeue", "canary_above", "breaker")
        at_least(self, 1, "pack")
        self._check_texts()
        asked = {name for name in ("slurm", "lsf") if getattr(self, name)}
        if self.scheduler != "local":
            asked.add(self.scheduler)
        if len(asked) > 1:
            raise SettingsError(f"env: asks for {' and '.join(sorted(asked))} at once; choose one scheduler")
        for name in asked:
            self.scheduler = name  # type: ignore[assignment]  # one of the Literal's values
        if self.pack > 1 and self.nodes > 1:
            raise SettingsError(f"env.pack={self.pack}: packs runs into one node, but env.nodes={self.nodes}")
        if self.ngpu and self.nproc and self.nproc > self.ngpu:
            raise SettingsError(f"env.nproc={self.nproc}: more processes than env.ngpu={self.ngpu} GPUs")

    def _check_texts(self) -> None:
        for name in self.vars:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise SettingsError(f"env.vars.{name}: no name of an environment variable")
        for name in self.extra:
            if not re.fullmatch(r"[A-Za-z][\w-]*", name):
                raise SettingsError(f"env.extra.{name}: no name of an option; without the dashes in front")
        texts = {
            **vars(self),
            **{f"{group}.{k}": v for group in ("extra", "vars") for k, v in vars(self)[group].items()},
        }
        texts |= {f"{group}.{i}": v for group in ("setup", "mounts") for i, v in enumerate(vars(self)[group])}
        for name, value in texts.items():
            if isinstance(value, str) and not value.isprintable():
                raise SettingsError(f"env.{name}={value!r}: has a control character")
        if self.timeout_min and self.timeout_min * 60 <= self.signal_s:
            raise SettingsError(f"env.signal_s={self.signal_s}: not below env.timeout_min={self.timeout_min} minutes")

    @property
    def cpus_per_node(self) -> int:
        return self.processes_per_node * (self.cpus or (self.threads or 1) + self.workers)

    @property
    def processes_per_node(self) -> int:
        return self.nproc or max(self.ngpu or 0, 1)

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node
