"""--shard: each process keeps a part of gradients and optimizer (ZeRO-2), and checkpoints hold full tensors."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from emotions.model import EmotionClassifier


def shard_parameters(model: EmotionClassifier) -> nn.Module:
    """The model, whose parameters become this process's parts of them.

    They are gathered for the forward pass and kept until the backward pass is over.
    """
    lists = [module for module in model.encoder.modules() if isinstance(module, nn.ModuleList)]
    for layer in max(lists, key=len):
        fully_shard(layer, reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=False)


class FullState(NamedTuple):
    """Sharded tensors as a checkpoint keeps them: full ones on the CPU, in rank 0; every process must ask."""

    get: Callable[..., dict]
    set: Callable[..., object]

    def state_dict(self) -> dict:
        return self.get(options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load_state_dict(self, state: dict) -> None:
        self.set(state, options=StateDictOptions(full_state_dict=True))


def full_state(model: EmotionClassifier, optimizer: Optimizer) -> dict[str, FullState]:
    """A sharded model and its optimizer as what a checkpoint saves and restores."""
    return {
        "model": FullState(partial(get_model_state_dict, model), partial(set_model_state_dict, model)),
        "optimizer": FullState(
            partial(get_optimizer_state_dict, model, optimizer), partial(set_optimizer_state_dict, model, optimizer)
        ),
    }
