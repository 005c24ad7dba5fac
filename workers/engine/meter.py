"""Running means of what a model returns, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import distributed


class Meter:
    """Sums of scalars since the last ``read``. Part of the checkpoint, so that a resumed run writes the same lines:
    every rank's own sums, since the mean of a mean would round differently."""

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] = []
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)
        self.count = 0
        self.of_all = self.sums[None]
        self._bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, scalars: Mapping[str, Tensor], step: int) -> None:
        """No synchronisation with the device: the check for a finite loss is kept there, too."""
        if not self.count:
            self.names = list(scalars)
            self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        values = torch.stack([scalars[name].detach() for name in self.names]).to(self.sums)
        self.sums += values
        self.count += 1
        bad = (self._bad < 0) & ~scalars["loss"].detach().isfinite()
        self._bad = torch.where(bad, step + 1, self._bad)

    @property
    def first_bad(self) -> int:
        """The first step whose loss was not finite; -1 when all were."""
        return int(self._bad)

    def read(self) -> dict[str, float]:
        """``{"train/loss": ...}``: means over the ranks and the steps since the last call."""
        means = distributed.mean(self.sums / max(self.count, 1)).tolist()
        self.sums, self.count = torch.zeros_like(self.sums), 0
        return {f"train/{name}": value for name, value in zip(self.names, means, strict=True)}

    def collect(self) -> None:
        """Bring the sums of all ranks together; all ranks call it right before a checkpoint."""
        self.of_all = distributed.gather(self.sums[None])

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "sums": self.of_all, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.names, self.count, self.of_all = state_dict["names"], state_dict["count"], state_dict["sums"]
        same_world = len(self.of_all) == distributed.world_size()
        mine = self.of_all[distributed.rank()] if same_world else self.of_all.mean(0)
        self.sums = mine.to(self.device, copy=True)
