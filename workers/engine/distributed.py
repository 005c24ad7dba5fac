"""The only file that talks to ``torch.distributed``. Everything works, unchanged, in one process."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the group that torchrun describes in the environment; alone without torchrun."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if "RANK" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def fold(*numbers: int) -> int:
    """Mix integers into one seed of 63 bits, so that (seed, rank, step) never collide by arithmetic."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def seed(run: int, *position: int) -> None:
    """Make the randomness from here on a function of (run seed, rank, position)."""
    torch.manual_seed(fold(run, rank(), *position))


def wrap(model: nn.Module) -> nn.Module:
    """For data-parallel training. Buffers are broadcast only where BatchNorm has some that training changes."""
    if world_size() == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # since torch 2.13
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": batch_norm}
    return ddp(model, gradient_as_bucket_view=True, **buffers)


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def synchronised(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Add up the gradients of the ranks in the last micro-batch of an accumulation window only."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def mean(values: Tensor) -> Tensor:
    """The mean over the ranks, of a tensor of the same shape on each."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def total(values: Tensor) -> Tensor:
    """The sum over the ranks."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


class _Total(torch.autograd.Function):
    """``total``, through which gradients flow: every rank's loss depends on every rank's values."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return total(values)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return total(grads[0].contiguous())


def total_with_gradient(values: Tensor) -> Tensor:
    out: Tensor = _Total.apply(values)
    return out


def agree(tensors: Iterable[Tensor]) -> None:
    """Overwrite them, on every rank, by those of rank 0."""
    if dist.is_initialized():
        for each in tensors:
            dist.broadcast(each, src=0)


def exchange(numbers: Sequence[int]) -> list[list[int]]:
    """Every rank's integers, on every rank: (world, len(numbers))."""
    if not dist.is_initialized():
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device())
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return [each.tolist() for each in everyone]


def gather(values: Tensor) -> Tensor:
    """Concatenate (n_r, ...) over the ranks, whose n_r may differ: (sum n_r, ...), in the order of the ranks."""
    if not dist.is_initialized():
        return values
    lengths = [n for (n,) in exchange([len(values)])]
    padded = values.new_zeros((max(lengths), *values.shape[1:]))
    padded[: len(values)] = values
    everyone = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everyone, padded)
    return torch.cat([each[:n] for each, n in zip(everyone, lengths, strict=True)])


def gather_equal(values: Tensor) -> Tensor:
    """``gather`` where every rank has as many rows, (n, ...) -> (world n, ...); no sizes go round, nothing waits."""
    if not dist.is_initialized():
        return values
    everyone = values.new_empty((world_size() * len(values), *values.shape[1:]))
    dist.all_gather_into_tensor(everyone, values.contiguous())
    return everyone


class _GatherEqual(torch.autograd.Function):
    """``gather_equal``, through which gradients flow: every rank's loss depends on every rank's rows."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return gather_equal(values)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return total(grads[0].contiguous()).chunk(world_size())[rank()]


def gather_with_gradient(values: Tensor) -> Tensor:
    """``gather_equal`` with gradients: the sum over the ranks of what their losses say about these rows, so that the
    mean that data-parallel training makes of the ranks' gradients is that of the mean of their losses."""
    out: Tensor = _GatherEqual.apply(values) if world_size() > 1 else values
    return out


def from_first(value: Any) -> Any:
    """What rank 0 has, on every rank; for small plain data."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
