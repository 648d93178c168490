"""From token states to one vector: mean, cls, max and attention, each blind to what its mask leaves out.

B batch, C masks a sequence (one for a pair; one for each criterion where they share a post), T tokens, D hidden
"""

import torch
from torch import Tensor, nn


class Pooler(nn.Module):
    """The mean, first token or maximum over a mask's tokens; or attention with one learned query q, q h / sqrt(D).

    At the start, q = 0, attention is the mean.
    """

    def __init__(self, kind: str, hidden_size: int):
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.query = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D), (B, C, T) true where pooled -> (B, C, D)."""
        if self.kind == "cls":
            first = mask.int().argmax(2)  # (B, C), whichever side is padded
            return hidden_states[torch.arange(len(mask), device=mask.device)[:, None], first]
        if self.kind == "max":
            lowest = torch.finfo(hidden_states.dtype).min
            return hidden_states[:, None].masked_fill(~mask[..., None], lowest).amax(2)  # (B, C, T, D) -> (B, C, D)
        if self.kind == "mean":
            weights = mask.to(hidden_states.dtype)
            return weights @ hidden_states / weights.sum(2, keepdim=True)
        scores = hidden_states @ self.query / len(self.query) ** 0.5  # (B, T)
        scores = scores[:, None].expand(mask.shape).masked_fill(~mask, -torch.inf)  # (B, C, T)
        return scores.softmax(2) @ hidden_states
