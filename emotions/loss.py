"""Multi-label losses: binary cross-entropy, focal, asymmetric (ASL) and ASL mixed with BCE.

B rows, L labels. A cell is one label of one row, p = sigmoid(logit). Each loss is two functions of the logit: what the
cell costs where the label is there, and where it is not; labels, class weights and smoothing only mix the two. A
row's loss is the SUM over its known labels, as in ASL's paper, not their mean: next to a mean over labels the gradient
is L times larger. The caller takes the mean over rows.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emotions.config import Config

MAX_WEIGHT = 100.0  # of a class: one row of a label seen once in ten thousand must not be a whole batch's gradient


def class_weights(setting: str, positives: np.ndarray, known: np.ndarray) -> Tensor | None:
    """(L,) weights of the positive cells in fp32, None for "off". "balanced": negatives / positives, to MAX_WEIGHT.

    positives, known: (L,) rows that have the label, and rows in which it is known. A label with only one of the two
    kinds of rows has nothing to balance and keeps 1.
    """
    if setting == "off":
        return None
    positives, negatives = (torch.from_numpy(counts).float() for counts in (positives, known - positives))
    weights = (negatives / positives.clamp_min(1)).clamp_max(MAX_WEIGHT)
    return torch.where((positives > 0) & (negatives > 0), weights, 1.0)


def bce(logits: Tensor) -> tuple[Tensor, Tensor]:
    """-log p and -log(1 - p), any shape; logsigmoid has no epsilon that would stop the gradient of a hard cell."""
    return -F.logsigmoid(logits), -F.logsigmoid(-logits)


def focal(logits: Tensor, gamma: float, detach_focus: bool) -> tuple[Tensor, Tensor]:
    """-(1 - p)^gamma log p and -p^gamma log(1 - p) (arXiv 1708.02002), any shape.

    detach_focus: the factors before the logarithms are constants to autograd.
    """
    positive, negative = bce(logits)
    # x^gamma = exp(gamma log x): a power's own derivative is infinite at x = 0 where gamma < 1
    positive_focus, negative_focus = torch.exp(-gamma * negative), torch.exp(-gamma * positive)
    if detach_focus:
        positive_focus, negative_focus = positive_focus.detach(), negative_focus.detach()
    return positive_focus * positive, negative_focus * negative


def asymmetric(
    logits: Tensor, gamma_neg: float, gamma_pos: float, clip: float, detach_focus: bool
) -> tuple[Tensor, Tensor]:
    """-(1 - p)^gamma_pos log p and -p_m^gamma_neg log(1 - p_m), p_m = max(p - clip, 0) (arXiv 2009.14119), any shape.

    A negative below the margin clip has loss and gradient 0. detach_focus as in focal.
    """
    positive = focal(logits, gamma_pos, detach_focus)[0]
    if clip == 0:
        return positive, focal(logits, gamma_neg, detach_focus)[1]
    shifted = F.relu(logits.sigmoid() - clip)  # p_m is at most 1 - clip, so that log1p(-p_m) stays finite
    focus = shifted**gamma_neg  # relu passes no gradient back at 0, whatever the power's derivative is there
    if detach_focus:
        focus = focus.detach()
    return positive, focus * -torch.log1p(-shifted)


def cell_losses(logits: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """(B, L) -> the loss of each cell as a positive and as a negative, (B, L) each, without weights and smoothing."""
    if config.loss == "bce":
        return bce(logits)
    if config.loss == "focal":
        return focal(logits, config.focal_gamma, config.detach_focus)
    terms = asymmetric(logits, config.gamma_neg, config.gamma_pos, config.clip, config.detach_focus)
    if config.loss == "asl":
        return terms
    ratio = config.combined_ratio
    positive, negative = (ratio * asl + (1 - ratio) * cross for asl, cross in zip(terms, bce(logits)))
    return positive, negative


def emotion_loss(
    logits: Tensor, labels: Tensor, known: Tensor, config: Config, weights: Tensor | None = None
) -> Tensor:
    """Loss of each row, (B,): the sum over its known labels, in fp32 (float64 stays). The caller sums and divides.

    logits, labels: (B, L); known: (B, L) bool. Labels are 0 or 1, or between the two for interpolated rows: the loss is
    linear in them. With smoothing s a positive cell costs (1 - s/2) of its positive and s/2 of its negative loss, and
    a negative cell the reverse: the target is y (1 - s) + s/2. weights: (L,), label by label, multiply what the
    positive cells cost, like BCEWithLogitsLoss's pos_weight: where 1 row in 100 has a label, its cells are balanced by
    weighing its positives; weighing both kinds would only make the label louder. Unlike pos_weight, a negative's
    smoothed part is not weighted: with weight 100 and s = .1 its optimum would be p = .84 instead of .05.

    A cell that is not known has loss and gradient exactly 0, whatever its logit or label is, nan and inf included.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    labels = labels.to(logits.dtype)
    # The first where keeps unknown cells out of the gradient, the last out of the sum: multiplied by 0, nan stays nan.
    positive, negative = cell_losses(torch.where(known, logits, 0.0), config)
    half = config.label_smoothing / 2
    as_positive, as_negative = (1 - half) * positive + half * negative, half * positive + (1 - half) * negative
    if weights is not None:
        as_positive = weights.to(logits) * as_positive
    cells = labels * as_positive + (1 - labels) * as_negative
    return torch.where(known, cells, 0.0).sum(1)
