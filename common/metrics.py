"""Classification metrics, all from scikit-learn, as plain numbers that JSON can hold."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)


def classification_metrics(labels: Sequence[int], predictions: Sequence[int], class_names: Sequence[str]) -> dict:
    """Accuracy, macro and weighted and per-class precision, recall, F1, and the confusion matrix.

    labels, predictions: (N,) class indices below len(class_names). A class that occurs in neither has precision,
    recall and F1 of 0 and counts in the macro mean; scikit-learn's zero_division=0 says the same.
    The confusion matrix has true classes in rows, predicted classes in columns.
    Raises ValueError when there is nothing to score or an index is out of range.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    classes = np.arange(len(class_names))
    if labels.size == 0:
        raise ValueError("no rows to score")
    if not (np.isin(labels, classes).all() and np.isin(predictions, classes).all()):
        raise ValueError(f"class indices must lie in 0..{len(class_names) - 1}")
    result = {"rows": int(labels.size), "accuracy": float(accuracy_score(labels, predictions))}
    for average in ("macro", "weighted"):
        scores = precision_recall_fscore_support(
            labels, predictions, labels=classes, average=average, zero_division=0
        )[:3]
        result |= {f"{name}_{average}": float(score) for name, score in zip(("precision", "recall", "f1"), scores)}
    columns = precision_recall_fscore_support(labels, predictions, labels=classes, zero_division=0)
    result["per_class"] = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in zip(class_names, *columns)
    }
    result["confusion_matrix"] = confusion_matrix(labels, predictions, labels=classes).tolist()
    return result


def ranking_metrics(labels: Sequence[int], probabilities: Sequence[float]) -> dict:
    """Area under the precision-recall curve (average precision) and under the ROC curve, of binary labels (N,).

    None where they are undefined: without a positive, and for the ROC also without a negative.
    """
    labels = np.asarray(labels)
    positives = int(labels.sum())
    auprc = float(average_precision_score(labels, probabilities)) if positives else None
    return {"auprc": auprc, "auc": float(roc_auc_score(labels, probabilities)) if 0 < positives < len(labels) else None}


def per_label_metrics(labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str]) -> dict:
    """Precision, recall, F1 and support of each label's positives, and their macro means.

    labels, predictions: (N, L) of 0 and 1. A label without positives in either has zeros and counts in the means.
    """
    names, result = ("precision", "recall", "f1"), {}
    for name, truth, predicted in zip(label_names, labels.T, predictions.T):  # (N, 1) at once would be read as binary
        scores = precision_recall_fscore_support(truth, predicted, average="binary", zero_division=0)[:3]
        result[name] = dict(zip(names, map(float, scores))) | {"support": int(truth.sum())}
    means = {f"{name}_macro": float(np.mean([row[name] for row in result.values()])) for name in names}
    return means | {"per_label": result}
