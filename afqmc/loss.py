"""The loss of a pair and the weights of the labels.

B batch, K labels
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from afqmc.config import Config
from afqmc.dataset import Split, listed
from common.checkpoint import UserError


def class_weights(setting: str, train: Split) -> Tensor | None:
    """(K,) weights in fp32, None for "off". "balanced": N / (K N_c) of the training labels, scikit-learn's formula.

    Raises UserError where there are not as many numbers as labels.
    """
    if setting == "off":
        return None
    if setting != "balanced":
        weights = torch.tensor([float(weight) for weight in setting.split(",")])
        if len(weights) != len(train.names):
            raise UserError(f"class_weights {setting}: expected a number for each of {listed(train.names)}")
        return weights
    counts = torch.bincount(train.labels)  # no label is without a pair: split_pairs sees to it
    return len(train.labels) / (len(counts) * counts)


def pair_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, config: Config) -> Tensor:
    """Loss of each pair, (B,), from logits (B, K) and labels (B,), in fp32: the caller sums and divides.

    Cross-entropy with label smoothing; a pair of label c counts weights[c] times (torch's own weight argument would
    weigh the smoothed part by the other labels' weights); focal multiplies by (1 - p)^gamma, p the probability of the
    true label (arXiv 1708.02002, eq. 5).
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=config.label_smoothing)
    if weights is not None:
        loss = loss * weights.to(labels.device)[labels]
    if config.loss == "focal":
        rest = logits.softmax(dim=1).scatter(1, labels[:, None], 0.0).sum(dim=1)  # 1 - p without cancellation
        loss = loss * rest.clamp_min(torch.finfo(rest.dtype).tiny) ** config.focal_gamma
    return loss
