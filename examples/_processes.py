"""Training in several processes: each takes its rows of every minibatch, and all step together.

    torchrun --nproc-per-node 2 examples/char_lm.py                    # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/char_lm.py --parallel fsdp    # fully_shard: parameters are split as well

Without torchrun there is one process, and what follows does nothing.
"""

import copy
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

KINDS = ("ddp", "fsdp")


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def join() -> None:
    """Meet the other processes; from now on only the first one prints."""
    if started_by_torchrun() and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        # One that dies is noticed at once; one that has more to do, as in decode.py, may be waited for.
        dist.init_process_group(backend, timeout=timedelta(days=1))
        if rank():
            sys.stdout = open(os.devnull, "w")


def wait() -> None:
    """Go on when all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard(rows: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a minibatch, and how many they are.

    A process for which there is none takes part with the first row, counted as 0, since all have to meet.
    """
    mine = rows[rank() :: count()]
    return (mine, len(mine)) if len(mine) else (rows[:1], 0)


def mean_over_all(mean: Tensor, items: int) -> Tensor:
    """A mean over this process's items -> what gives, averaged over the processes, the mean over the items of all."""
    if count() == 1:
        return mean
    total = torch.tensor(float(items), device=mean.device)
    dist.all_reduce(total)
    return mean * (items * count() / total)


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed dropout and noise by iteration, for a resumed run to go on as before; processes draw different ones."""
    torch.manual_seed((((seed << 20) + iteration) * count() + rank()) % 2**63)


def average(value: Tensor) -> float:
    """The mean of the processes' values."""
    if count() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value.item() / count()


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if count() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags)
    return bool(flags)


def gather_state(state: Any) -> Any:
    """Put the states that belong to each process's rows, tensors with the batch in dimension 1, together again."""
    if isinstance(state, tuple):
        return tuple(gather_state(part) for part in state)
    if state is None or count() == 1:
        return state
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, state.cpu())
    whole = torch.cat(parts, dim=1)
    for i, part in enumerate(parts):
        whole[:, i :: count()] = part
    return whole


def shard_state(state: Any, device: torch.device) -> Any:
    """The inverse of gather_state: this process's columns, on the device."""
    if isinstance(state, tuple):
        return tuple(shard_state(part, device) for part in state)
    return None if state is None else state[:, rank() :: count()].contiguous().to(device)


class Loss(nn.Module):
    """A model together with its loss, so that forward is all that DistributedDataParallel and fully_shard must see."""

    def __init__(self, model: nn.Module, compute_loss: Callable[[nn.Module, int, Any], tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.model = model
        self.compute_loss = compute_loss

    def forward(self, iteration: int, state: Any) -> tuple[Tensor, Any]:
        return self.compute_loss(self.model, iteration, state)


def parallelize(loss: Loss, kind: str) -> nn.Module:
    """The loss as all processes compute it together; with "fsdp" the parameters are split copies of the model's."""
    if count() == 1:
        return loss
    if kind == "ddp":
        return DistributedDataParallel(loss)
    device = next(loss.parameters()).device
    split = Loss(copy.deepcopy(loss.model), loss.compute_loss)
    return fully_shard(split, mesh=init_device_mesh(device.type, (count(),)))
