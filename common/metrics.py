"""Classification metrics, all from scikit-learn, as plain numbers that JSON can hold."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support


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
