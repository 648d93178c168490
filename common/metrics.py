"""Classification metrics, all from scikit-learn, correlations, and SQuAD's for spans, as numbers that JSON can hold."""

import re
import string
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from operator import itemgetter

import numpy as np
import regex
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)


def too_few(rows: int, of_class: dict[str, int]) -> str | None:
    """What to say of a split that is too small to choose an epoch or a threshold by; None where it is not.

    of_class: the rows of each class. 30 rows, and 10 of each class, are the least.
    """
    rare = [f"{count} of {name}" for name, count in of_class.items() if count < 10]
    if rows >= 30 and not rare:
        return None
    more = f" and {len(rare) - 3} more under 10" if len(rare) > 3 else ""
    return f"{rows} rows{', ' if rare else ''}{', '.join(rare[:3])}{more}: too few to choose by"


def classification_metrics(labels: Sequence[int], predictions: Sequence[int], class_names: Sequence[str]) -> dict:
    """Accuracy, macro and weighted and per-class precision, recall, F1, and the confusion matrix.

    labels, predictions: (N,) class indices below len(class_names). A class that occurs in neither has precision,
    recall and F1 of 0 and counts in the macro mean; scikit-learn's zero_division=0 says the same. f1_macro_occurring is
    the mean over the classes that labels holds.
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
    result["f1_macro_occurring"] = float(np.mean([row["f1"] for row in result["per_class"].values() if row["support"]]))
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


def per_label_metrics(
    labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str], known: np.ndarray | None = None
) -> dict:
    """Precision, recall, F1 and support of each label's positives, and their macro means.

    labels, predictions: (N, L) of 0 and 1; known, (N, L), says which cells count: all, where it is not given. A label
    without positives in either has zeros and counts in the means, unless no row knows it. f1_macro_occurring is the
    mean over the labels with a positive among the labels, None without one.
    """
    known = np.ones(labels.shape, dtype=bool) if known is None else known
    names, result = ("precision", "recall", "f1"), {}
    for name, truth, predicted, counts in zip(label_names, labels.T, predictions.T, known.T):  # (N,) each
        scores = binary_scores(truth[counts], predicted[counts])
        result[name] = dict(zip(names, scores)) | {"support": int(truth[counts].sum())}
    counted = [row for row, counts in zip(result.values(), known.T) if counts.any()]
    means = {f"{name}_macro": float(np.mean([row[name] for row in counted])) for name in names}
    occurring = [row["f1"] for row in counted if row["support"]]
    means["f1_macro_occurring"] = float(np.mean(occurring)) if occurring else None
    return means | {"per_label": result}


def binary_scores(labels: np.ndarray, predictions: np.ndarray) -> list[float]:
    """Precision, recall and F1 of the positives of (N,) 0 and 1; 0 where one is undefined."""
    if not labels.size:
        return [0.0, 0.0, 0.0]
    scores = precision_recall_fscore_support(labels, predictions, average="binary", zero_division=0)
    return [float(score) for score in scores[:3]]


def multilabel_metrics(
    labels: np.ndarray, predictions: np.ndarray, label_names: Sequence[str], known: np.ndarray
) -> dict:
    """per_label_metrics with micro means (over all cells) and means weighted by support, and the labels a row has.

    labels, predictions, known: (N, L). Unknown cells count in nothing. Raises ValueError when no cell is known.
    """
    if not known.any():
        raise ValueError("no rows to score")
    result = per_label_metrics(labels, predictions, label_names, known)
    names, rows = ("precision", "recall", "f1"), list(result["per_label"].values())
    result |= {f"{name}_micro": score for name, score in zip(names, binary_scores(labels[known], predictions[known]))}
    support = np.array([row["support"] for row in rows])
    for name in names:
        result[f"{name}_weighted"] = float(support @ [row[name] for row in rows] / max(support.sum(), 1))
    for name, cells in (("true", labels), ("predicted", predictions)):
        result[f"cardinality_{name}"] = float((cells & known).sum() / len(labels))
    return result


def mean_average_precision(labels: np.ndarray, probabilities: np.ndarray, known: np.ndarray) -> float | None:
    """Mean over the labels of the average precision among the rows that know them; all (N, L).

    A label without a positive has none and is left out; None where that is all of them.
    """
    scores = [
        average_precision_score(truth[counts], probability[counts])
        for truth, probability, counts in zip(labels.T, probabilities.T, known.T)
        if truth[counts].any()
    ]
    return float(np.mean(scores)) if scores else None


# Spans, as SQuAD scores them (arXiv 1606.05250, sec. 6.1; with unanswerable questions 1806.03822, sec. 5), from 0 to 1.
# Where a script has no blanks between words, each character counts as one (as in CMRC, arXiv 1810.07366).

FULL_WIDTH = [chr(ord(character) + 0xFEE0) for character in string.punctuation]
CJK = map(chr, (*range(0x3001, 0x3040), *range(0xFF5F, 0xFF66)))
CJK_PUNCTUATION = [character for character in CJK if unicodedata.category(character)[0] in "PS"]  # 々 and 〇 are none
WITHOUT_PUNCTUATION = str.maketrans("", "", "".join([string.punctuation, *FULL_WIDTH, *CJK_PUNCTUATION]))

SCRIPTS = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
UNSPACED = "".join(rf"\p{{Script={name}}}" for name in SCRIPTS) + "ーｰ〆"
PUNCTUATION = rf"\p{{P}}\p{{Cf}}{re.escape(string.punctuation)}"
OTHER = f"[^{UNSPACED}{PUNCTUATION}]+"
CHARACTER = regex.compile(f"[{UNSPACED}]")
PIECE = regex.compile(rf"[{UNSPACED}][\p{{M}}ﾞﾟ]*|{OTHER}(?:[{PUNCTUATION}]+{OTHER})*")

Span = tuple[int, int]  # characters, the end exclusive


def word_spans(text: str) -> list[Span]:
    """What stands between blanks.

    Where that holds characters of a script without blanks: each, with its marks, and what else stands between them,
    without punctuation around it.
    """
    words = list(re.finditer(r"\S+", text))
    if CHARACTER.search(text):
        pieces = (PIECE.finditer(text, *w.span()) if CHARACTER.search(w[0]) else [w] for w in words)
        words = chain.from_iterable(pieces)
    return [word.span() for word in words]


def normalize_answer(text: str) -> list[str]:
    """The words of an answer: lower case, no a, an, the, no punctuation of ASCII, its full-width forms and CJK's."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(WITHOUT_PUNCTUATION))
    return [text[start:end] for start, end in word_spans(text)]


def answer_scores(prediction: str, golds: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of the words, each with the gold answer that suits it best.

    No gold answer, or none with a word in it, means that "" is the answer; where one side is empty, F1 is exact match.
    """
    predicted = normalize_answer(prediction)
    wanted = [words for gold in golds if (words := normalize_answer(gold))] or [[]]
    exact = float(predicted in wanted)
    if not predicted:
        return exact, exact
    shared = [sum((Counter(predicted) & Counter(words)).values()) for words in wanted]
    return exact, max(2 * n / (len(predicted) + len(words)) for n, words in zip(shared, wanted))


def span_metrics(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> dict:
    """Mean exact match and F1 over examples, over those with an answer and over those without ("" is right there).

    predictions: (N,) one text each; golds: (N,) lists, empty for no answer. f1_balanced: the mean of the two kinds' F1,
    which an answer that is always, or never, empty cannot raise above .5. A kind without examples is None.
    Raises ValueError when there is nothing to score.
    """
    if not predictions:
        raise ValueError("no examples to score")
    scores = np.array([answer_scores(*pair) for pair in zip(predictions, golds)])  # (N, 2)
    answerable = np.array([len(gold) > 0 for gold in golds])
    result: dict = {}
    for name, chosen in (("all", answerable | True), ("has_answer", answerable), ("no_answer", ~answerable)):
        exact, f1 = scores[chosen].mean(0).tolist() if chosen.any() else (None, None)
        result[name] = {"exact_match": exact, "f1": f1, "rows": int(chosen.sum())}
    kinds = [result[name]["f1"] for name in ("has_answer", "no_answer") if result[name]["rows"]]
    return {**result.pop("all"), "f1_balanced": sum(kinds) / len(kinds), **result}


def precision_recall_f1(right: int, predicted: int, wanted: int) -> dict:
    """From counts over all examples (micro); 0 where there is nothing to divide by."""
    f1 = 2 * right / (predicted + wanted) if predicted + wanted else 0.0
    return {"precision": right / predicted if predicted else 0.0, "recall": right / wanted if wanted else 0.0, "f1": f1}


def token_metrics(contexts: Sequence[str], predicted: Sequence[Sequence[Span]], golds: Sequence[list]) -> dict:
    """Precision, recall and F1 over the words (word_spans) of the contexts, by place: those that a span touches.

    predicted: (N,) lists of spans. golds: (N,) lists of alternatives, each a list of spans that are true together; of
    several the one that shares most (F1) with the prediction counts. Micro-averaged.
    """
    counts = np.zeros(3, dtype=int)
    for context, spans, alternatives in zip(contexts, predicted, golds):
        words = word_spans(context)
        found = touched(words, spans)
        wanted = [touched(words, alternative) for alternative in alternatives] or [set()]
        best = max(wanted, key=lambda gold: 2 * len(found & gold) / max(len(found) + len(gold), 1))
        counts += len(found & best), len(found), len(best)
    return precision_recall_f1(*counts.tolist())


def touched(words: Sequence[Span], spans: Sequence[Span]) -> set[int]:
    """Numbers of the words that share a character with one of the spans."""
    first, last = partial(bisect_right, words, key=itemgetter(1)), partial(bisect_left, words, key=itemgetter(0))
    return {number for start, end in spans for number in range(first(start), last(end))}


def multi_span_metrics(predicted: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> dict:
    """Precision, recall and F1 of whole spans, equal after normalize_answer; each example's spans are a set.

    Micro-averaged, as the exact match F1 of MultiSpanQA (Li et al., NAACL 2022).
    """
    pairs = [({tuple(normalize_answer(text)) for text in texts} for texts in pair) for pair in zip(predicted, golds)]
    counts = np.array([(len(a & b), len(a), len(b)) for a, b in pairs]).reshape(-1, 3).sum(0)
    return precision_recall_f1(*counts.tolist())


def correlation_metrics(scores: Sequence[float], similarities: Sequence[float]) -> dict:
    """Spearman's and Pearson's correlation of people's scores (N,) with a model's similarities (N,), and N.

    Raises ValueError where one side is constant: a correlation is undefined there.
    """
    if len(set(scores)) < 2 or len(set(similarities)) < 2:
        raise ValueError("there is no correlation with a constant")
    spearman, pearson = (float(measure(scores, similarities).statistic) for measure in (spearmanr, pearsonr))
    return {"pairs": len(scores), "spearman": spearman, "pearson": pearson}
