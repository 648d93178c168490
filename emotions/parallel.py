"""Several processes as one: what torchrun starts, gradients that are averaged, runs that hang.

    torchrun --nproc_per_node 2 emotions/train.py ...            # each process holds the model (DDP)
    torchrun --nproc_per_node 2 emotions/train.py --shard ...    # and a part of gradients and optimizer (ZeRO-2)
"""

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from common.checkpoint import UserError
from common.checkpoint.environment import pick_device
from emotions.model import EmotionClassifier

Made = TypeVar("Made")


class Processes(NamedTuple):
    """This process's number, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device


def start_processes(stall_seconds: int) -> Processes:
    """Join the processes that torchrun started; alone without it. Only rank 0 prints."""
    if "WORLD_SIZE" not in os.environ:
        return Processes(0, 1, pick_device())
    device = pick_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"more processes than GPUs: this machine has {torch.cuda.device_count()}, see --nproc_per_node")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with watchdog(stall_seconds):
        store, rank, world = next(dist.rendezvous("env://"))
        # After a restart torchrun's store still holds the addresses of the processes that are gone: names of its own
        # keep this attempt from waiting for them.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
    return Processes(rank, world, device)


def end_processes() -> None:
    """Leave them. After an error they are left to the launcher, which ends the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_0_first(make: Callable[[], Made], processes: Processes) -> Made:
    """make() in rank 0, and then in the others; where it raises there, the others end without a word."""
    refused = [False]
    if processes.rank == 0:
        try:
            made = make()
        except (UserError, OSError):
            refused = [True]
            raise
        finally:
            if processes.world > 1:
                dist.broadcast_object_list(refused, src=0)
        return made
    dist.broadcast_object_list(refused, src=0)
    if refused[0]:
        sys.exit(1)
    return make()


def barrier(processes: Processes) -> None:
    """Wait until every process is here."""
    if processes.world > 1:
        dist.barrier()


def all_reduce(tensor: Tensor, processes: Processes) -> Tensor:
    """A tensor of the CPU, summed over the processes."""
    if processes.world == 1:
        return tensor
    tensor = tensor.to(processes.device)
    dist.all_reduce(tensor)
    return tensor.cpu()


def parallelize(
    model: EmotionClassifier, shard: bool, dtype: torch.dtype | None, processes: Processes
) -> nn.Module:
    """The module whose backward averages gradients over the processes; the model itself where there is one."""
    if shard:
        if processes.world == 1:
            raise UserError("shard needs several processes: torchrun --nproc_per_node 2 emotions/train.py --shard")
        if dtype == torch.float16:
            raise UserError("shard and fp16 do not go together here: set amp bf16 or off")
        from emotions.sharding import shard_parameters  # a second that --help has no use for

        return shard_parameters(model)
    return DistributedDataParallel(model) if processes.world > 1 else model


def gradient_sync(module: nn.Module, last: bool) -> AbstractContextManager:
    """A context for one micro-batch: DDP exchanges gradients in the backward pass of a step's last one only.

    A sharded model does so each time: full gradients, kept from one micro-batch to the next, are what it has no room
    for.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, put together where each process holds a part of it; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def stateful(model: EmotionClassifier, optimizer: Optimizer, shard: bool) -> dict:
    """Model and optimizer as what a checkpoint saves and restores."""
    if shard:
        from emotions.sharding import full_state

        return full_state(model, optimizer)
    return {"model": model, "optimizer": optimizer}


@contextmanager
def watchdog(seconds: int) -> Iterator[Callable[[], None]]:
    """Inside, a process that hangs dumps its stacks on stderr and ends; 0: never.

    Gives the function that starts the seconds anew: whoever works there calls it more often than that.
    """

    def restart() -> None:
        if seconds:  # not sys.stderr: in a notebook that is not a file
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    restart()
    try:
        yield restart
    finally:
        if seconds:
            faulthandler.cancel_dump_traceback_later()
