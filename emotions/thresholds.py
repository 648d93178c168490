"""From logits to labels: one threshold for all, a smoothed one for each label, and honest scores of both.

N rows, L labels. All thresholds are logits here; a label is predicted where its logit is at least the threshold.
"""

from typing import NamedTuple

import numpy as np

from emotions.dataset import FOLDS


class Thresholds(NamedTuple):
    """The one threshold that is best for all labels, and (L,) each label's own."""

    shared: float
    per_label: np.ndarray


def f1_by_rank(labels: np.ndarray) -> np.ndarray:
    """(N,) labels in falling order of the logit -> (N + 1,) F1 when the first 0, 1, ... N of them are predicted."""
    positives = int(labels.sum())
    true_positives = np.concatenate([[0], np.cumsum(labels)])
    return 2 * true_positives / np.maximum(np.arange(len(labels) + 1) + positives, 1)


def middle_of_best_gap(logits: np.ndarray, scores: np.ndarray) -> float:
    """The cut with the best score: logits (N,) fall, scores (N + 1,) are those of predicting the first 0 to N.

    The middle between the neighbours, since a threshold at the last one taken would miss its like; a cut between
    equal logits cannot be made. Of equally good cuts the one that predicts least.
    """
    possible = np.concatenate([[True], logits[:-1] > logits[1:], [True]])
    best = int(np.argmax(np.where(possible, scores, -1.0)))
    if best == 0:
        return float(logits[0]) + 1.0  # nothing is predicted
    return float((logits[best - 1] + logits[best]) / 2) if best < len(logits) else float(logits[-1]) - 1.0


def best_threshold(logits: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best F1 of one label's (N,) rows; exact over all cuts."""
    order = np.argsort(-logits, kind="stable")
    return middle_of_best_gap(logits[order], f1_by_rank(labels[order]))


def shared_threshold(logits: np.ndarray, labels: np.ndarray, known: np.ndarray) -> float:
    """The one threshold with the best macro-F1, over all cuts of all known cells; (N, L) each.

    Going down the sorted cells, each changes the F1 of its own label only: the macro-F1 is a running sum.
    """
    cells, changes = [], []
    for column in range(logits.shape[1]):
        own = known[:, column]
        order = np.argsort(-logits[own, column], kind="stable")
        cells.append(logits[own, column][order])
        changes.append(np.diff(f1_by_rank(labels[own, column][order])))
    cells, changes = np.concatenate(cells), np.concatenate(changes)
    order = np.argsort(-cells, kind="stable")
    return middle_of_best_gap(cells[order], np.concatenate([[0.0], np.cumsum(changes[order])]))


def tune(logits: np.ndarray, labels: np.ndarray, known: np.ndarray, smoothing: float) -> Thresholds:
    """The thresholds for (N, L) logits. A label with n positives has (n own + smoothing shared) / (n + smoothing).

    So a label with a handful of positives, whose own best threshold is mostly noise, stays near the shared one, which
    all positives together have chosen. A label without positives has the shared one.
    """
    shared = shared_threshold(logits, labels, known)
    per_label = np.full(logits.shape[1], shared)
    for column in range(logits.shape[1]):
        own = known[:, column]
        if positives := int(labels[own, column].sum()):
            found = best_threshold(logits[own, column], labels[own, column])
            per_label[column] = (positives * found + smoothing * shared) / (positives + smoothing)
    return Thresholds(shared, per_label)


def cross_fitted(
    logits: np.ndarray, labels: np.ndarray, known: np.ndarray, smoothing: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (N, L) at the shared and at the per-label thresholds, each row's tuned without its own fold.

    Their scores are estimates for new rows; those of thresholds tuned on the rows they are scored on flatter.
    """
    folds = np.random.default_rng(seed).permutation(len(logits)) % FOLDS
    shared, per_label = np.zeros(labels.shape, dtype=bool), np.zeros(labels.shape, dtype=bool)
    for fold in range(FOLDS):
        inside = folds == fold
        found = tune(logits[~inside], labels[~inside], known[~inside], smoothing)
        shared[inside] = logits[inside] >= found.shared
        per_label[inside] = logits[inside] >= found.per_label
    return shared, per_label
