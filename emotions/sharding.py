"""--shard: each process keeps a part of gradients and optimizer (ZeRO-2), and checkpoints hold full tensors."""

from dataclasses import dataclass

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


@dataclass
class ShardedModel:
    """A sharded model's parameters as a checkpoint keeps them: full tensors on the CPU, in rank 0."""

    model: EmotionClassifier

    def state_dict(self) -> dict:
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load_state_dict(self, state: dict) -> None:
        set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True))


@dataclass
class ShardedOptimizer:
    """The optimizer of a sharded model likewise."""

    model: EmotionClassifier
    optimizer: Optimizer

    def state_dict(self) -> dict:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(self.model, self.optimizer, options=options)

    def load_state_dict(self, state: dict) -> None:
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=options)
