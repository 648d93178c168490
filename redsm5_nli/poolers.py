"""From token states to one vector: mean, cls, max and attention, each blind to what its mask leaves out.

B batch, C masks a sequence (one for a pair; one for each criterion where they share a post), T tokens, D hidden
"""

import torch
from torch import Tensor, nn


class MeanPooler(nn.Module):
    """The mean over the tokens of the mask."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D), (B, C, T) true where pooled -> (B, C, D), as in the other poolers."""
        weights = mask.to(hidden_states.dtype)
        return weights @ hidden_states / weights.sum(2, keepdim=True)


class ClsPooler(nn.Module):
    """The first token of the mask, whichever side is padded."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        first = mask.int().argmax(2)  # (B, C)
        return hidden_states[torch.arange(len(mask), device=mask.device)[:, None], first]


class MaxPooler(nn.Module):
    """Each feature's maximum over the tokens of the mask."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        lowest = torch.finfo(hidden_states.dtype).min
        return hidden_states[:, None].masked_fill(~mask[..., None], lowest).amax(2)  # (B, C, T, D) -> (B, C, D)


class AttentionPooler(nn.Module):
    """One learned query: softmax over the tokens of the mask of q h / sqrt(D). At the start, q = 0, it is the mean."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        scores = hidden_states @ self.query / len(self.query) ** 0.5  # (B, T)
        scores = scores[:, None].expand(mask.shape).masked_fill(~mask, -torch.inf)  # (B, C, T)
        return scores.softmax(2) @ hidden_states


def make_pooler(name: str, hidden_size: int) -> nn.Module:
    if name == "attention":
        return AttentionPooler(hidden_size)
    return {"mean": MeanPooler, "cls": ClsPooler, "max": MaxPooler}[name]()
