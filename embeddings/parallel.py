"""Several processes as one: what torchrun starts, and gradients that are summed.

    torchrun --nproc_per_node 2 embeddings/train.py ...
"""

import os
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.checkpoint import UserError
from common.checkpoint.environment import pick_device

Made = TypeVar("Made")


class Processes(NamedTuple):
    """This process's number, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device


def start_processes() -> Processes:
    """Join the processes that torchrun started; alone without it. Only rank 0 prints."""
    if "WORLD_SIZE" not in os.environ:
        return Processes(0, 1, pick_device())
    device = pick_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"more processes than GPUs: this machine has {torch.cuda.device_count()}, see --nproc_per_node")
    if device.type == "cuda":
        torch.cuda.set_device(device)
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


def all_reduce_gradients(parameters: list[nn.Parameter], processes: Processes) -> None:
    """Sum the parameters' gradients over the processes, in one message.

    Not DistributedDataParallel: processes cut their part of a batch into different numbers of chunks, and its forward
    pass talks to the others. Adapters are small enough for one message after the last chunk.
    """
    if processes.world == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))
