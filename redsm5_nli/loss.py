"""The loss of a (post, criterion) pair: cross-entropy weighted by class."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from redsm5_nli.dataset import LABELS


def class_weights(setting: str, labels: np.ndarray) -> Tensor | None:
    """(2,) weights in fp32, None for "off". "balanced": N / (2 N_c) of the training pairs, scikit-learn's formula."""
    if setting == "off":
        return None
    if setting != "balanced":
        return torch.tensor([float(weight) for weight in setting.split(",")])
    counts = torch.bincount(torch.from_numpy(labels).flatten(), minlength=len(LABELS))
    return labels.size / (len(LABELS) * counts)


def pair_loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted cross-entropy of each pair, (B, C), from logits (B, C, 2) and labels (B, C), in fp32.

    The caller sums and divides: a pair of label y counts weights[y] times, and weights never enter the divisor.
    """
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return loss if weights is None else loss * weights.to(labels.device)[labels]
