"""The small network, the names and the recorded draws of the stored MoCo and MixMask runs, for our modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.parity.stored import assert_close
from workers.engine import optim
from workers.main_moco_mixmask import MoCo
from workers.masking.mix import Draws
from workers.models import Encoder


class Small(Encoder):
    """Two convolutions with BatchNorm, of ``widths``; its vector is the mean of the map."""

    name, kwargs = "small", {}

    def __init__(self, widths: list[int]):
        super().__init__()
        first, second = widths
        self.conv1, self.bn1 = nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = nn.Conv2d(first, second, 3, 2, 1, bias=False), nn.BatchNorm2d(second)
        self.width = second

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images))))))
        return x.mean((2, 3))


class Recorded(Draws):
    """Plays back what the published program drew, and insists on the same questions in the same order."""

    def __init__(self, draws: list[dict[str, Any]], unused_first: bool = False):
        self.draws = list(draws)
        self.unused_first = unused_first  # MixMask alone draws a number for Un-Mix, which it does not use

    def __len__(self) -> int:
        return len(self.draws)

    def begin(self) -> None:
        """A new step."""
        if self.unused_first:
            self.next("np.rand", 1)

    def next(self, call: str, *args: float) -> Any:
        found = self.draws.pop(0)
        assert found["call"] == call, f"{call} instead of {found['call']}"
        assert torch.allclose(torch.tensor(found["args"]), torch.tensor([float(a) for a in args])), found
        return found["value"]

    def uniform(self, low: float, high: float) -> float:
        if self.draws[0]["call"] == "np.rand":
            assert (low, high) == (0, 1)
            return self.next("np.rand", 1)[0]
        return self.next("random.uniform", low, high)

    def integer(self, low: int, high: int) -> int:
        if self.draws[0]["call"] == "np.randint":  # one argument, not itself included
            assert low == 0
            return self.next("np.randint", high + 1)
        return self.next("random.randint", low, high)

    def grid(self, side: int) -> Tensor:
        return torch.tensor(self.next("np.rand", 1, 1, side, side), dtype=torch.float64)[0, 0]

    def beta(self, a: float, b: float) -> float:
        return self.next("np.beta", a, b)

    def permutation(self, n: int) -> Tensor:
        return torch.tensor(self.next("torch.randperm", n))


PAIRS = {"encoder_q.": ("encoder.", "projector."), "encoder_k.": ("target_encoder.", "target_projector.")}


def our_name(name: str) -> str:
    for theirs, (encoder, projector) in PAIRS.items():
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            return projector + rest.removeprefix("fc.") if rest.startswith("fc.") else encoder + rest
    return {"queue": "queue", "queue_ptr": "place"}[name]


def ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under our names; a key of the queue is a row here and a column there."""
    return {our_name(name): value.T if name == "queue" else value for name, value in state.items()}


def module(facts: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype) -> MoCo:
    kind = facts.get("mask_type", "block")
    method = MoCo(
        Small(facts["widths"]),
        method=facts["method"],
        dim=facts["dim"],
        queue_size=facts["K"],
        temperature=facts["T"],
        grid_size=facts["grid"],
        mask_type=kind,
        # how much of the picture stays is what they say for one type, how much goes for the other
        mask_ratio=1 - facts["mask_lam"] if kind == "block" else facts["mask_lam"],
        redraw=False,
        unmix_beta=facts.get("beta", 1.0),
        unmix_prob=facts["unmix_prob"],
    )
    method.load_state_dict(ours(state))
    return method.to(dtype)


def optimizer(method: MoCo, facts: dict[str, Any]) -> torch.optim.Optimizer:
    parts = [{"params": [p for p in method.parameters() if p.requires_grad]}]
    return optim.sgd(parts, lr=facts["lr"], momentum=facts["sgd_momentum"], weight_decay=facts["weight_decay"])


def flat(method: MoCo, names: list[str]) -> Tensor:
    """The parameters one after the other; ``names`` are theirs."""
    found = dict(method.named_parameters())
    return torch.cat([found[our_name(name)].detach().flatten() for name in names])


def assert_state(method: MoCo, state: dict[str, Tensor], relative: float) -> None:
    found = method.state_dict()
    for name, value in ours(state).items():
        assert_close(found[name], value, relative, name)
