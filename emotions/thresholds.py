"""From logits to labels: one threshold for all, a smoothed one for each label, and honest scores of both.

N rows, L labels. Thresholds are logits here, probabilities in best/thresholds.json; a label is predicted where its
logit or probability is at least its threshold.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from emotions.dataset import FOLDS


class Thresholds(NamedTuple):
    """The one threshold that is best for all labels, and (L,) each label's own."""

    shared: float
    per_label: np.ndarray


def f1_by_rank(labels: np.ndarray) -> np.ndarray:
    """(N,) labels in falling order of the logit -> (N + 1,) F1 when the first 0, 1, ... N of them are predicted."""
    true_positives = np.concatenate([[0], np.cumsum(labels)])
    return 2 * true_positives / np.maximum(np.arange(len(labels) + 1) + int(labels.sum()), 1)


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
    for logit, label, counts in zip(logits.T, labels.T, known.T):  # (N,) each
        order = np.argsort(-logit[counts], kind="stable")
        cells.append(logit[counts][order])
        changes.append(np.diff(f1_by_rank(label[counts][order])))
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
    for column, (logit, label, counts) in enumerate(zip(logits.T, labels.T, known.T)):
        if positives := int(label[counts].sum()):
            own = best_threshold(logit[counts], label[counts])
            per_label[column] = (positives * own + smoothing * shared) / (positives + smoothing)
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
        tuned = tune(logits[~inside], labels[~inside], known[~inside], smoothing)
        shared[inside] = logits[inside] >= tuned.shared
        per_label[inside] = logits[inside] >= tuned.per_label
    return shared, per_label


def thresholds_json(thresholds: Thresholds, names: tuple[str, ...]) -> dict:
    """Thresholds as best/thresholds.json holds them: probabilities, by name."""
    shared, per_label = (1 / (1 + np.exp(-np.asarray(value))) for value in thresholds)
    return {"shared": float(shared), "per_label": dict(zip(names, per_label.tolist()))}


def read_thresholds(folder: Path, names: tuple[str, ...]) -> Thresholds:
    """The thresholds of a best folder for its labels, as probabilities. Raises UserError."""
    path = folder / "thresholds.json"
    saved = read_json(path)
    per_label = saved.get("per_label")
    values = [saved.get("shared"), *(per_label.get(name) if isinstance(per_label, dict) else None for name in names)]
    if not all(isinstance(value, float) and 0 <= value <= 1 for value in values):
        raise UserError(f"{path} does not hold a shared threshold and one for each label, from 0 to 1")
    return Thresholds(values[0], np.array(values[1:]))
