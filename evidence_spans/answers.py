"""From the n best spans to answers: which one, whether there is any, and how sure that is."""

import math
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from evidence_spans.postprocess import Prediction, Span


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class Decoding:
    """How a run's logits become answers; tuned on validation, but for max_answer_length (tokens).

    threshold: the answer is empty iff difference > threshold; None: never empty. span_threshold: the same of each span
    where several are true at once; None where answers are alternatives. slope, intercept: the probability of no answer
    is sigmoid(slope * difference + intercept); None where validation holds one kind of example only. questions: what a
    run asks about each criterion, if it does.
    """

    max_answer_length: PositiveInt
    threshold: float | None
    span_threshold: float | None
    slope: float | None
    intercept: float | None
    questions: dict[str, str]


def read_decoding(folder: Path) -> Decoding:
    """How the model of a best folder turns logits into text. Raises UserError."""
    path = folder / "decoding.json"
    try:
        return Decoding(**read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        message = f"{first['loc'][0]} is {first['input']!r}, which no run writes: {first['msg']}"
        raise UserError(f"{path}: {message}") from error


def answer(prediction: Prediction, threshold: float | None) -> Span | None:
    """The best span; None for "no answer": null - best > threshold, or no span at all."""
    if not prediction.spans or (threshold is not None and prediction.difference > threshold):
        return None
    return prediction.spans[0]


def non_overlapping(prediction: Prediction) -> list[Span]:
    """The spans that overlap none that is better, the best first."""
    chosen: list[Span] = []
    for span in prediction.spans:
        if all(span.end <= other.start or other.end <= span.start for other in chosen):
            chosen.append(span)
    return chosen


def several_answers(prediction: Prediction, decoding: Decoding) -> list[Span]:
    """All spans that are an answer, none overlapping another, in the order of the text; of alternatives the best."""
    if decoding.span_threshold is None:
        return [span] if (span := answer(prediction, decoding.threshold)) else []
    spans = non_overlapping(prediction)
    return sorted(span for span in spans if prediction.null_score - span.score <= decoding.span_threshold)


def no_answer_probability(prediction: Prediction, decoding: Decoding) -> float | None:
    """Calibrated on validation; None where that held one kind of example only."""
    if decoding.slope is None:
        return None
    if not prediction.spans:
        return 1.0
    return float(1 / (1 + np.exp(-np.clip(decoding.slope * prediction.difference + decoding.intercept, -500, 500))))


def n_best(context: str, prediction: Prediction, decoding: Decoding) -> list[dict]:
    """The n best spans with probabilities that sum to 1 (a softmax over their scores), best first.

    Where answers may be empty, the empty one is among them, after the spans that are at least as probable.
    """
    scores = [span.score for span in prediction.spans]
    if with_null := decoding.threshold is not None:
        scores.append(prediction.null_score)
    top = max(scores, default=0.0)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    rows = [
        {"text": context[start:end], "start": start, "end": end, "probability": weight / total}
        for (start, end, _), weight in zip(prediction.spans, weights)
    ]
    if with_null:
        rows.append({"text": "", "start": None, "end": None, "probability": weights[-1] / total})
        rows.sort(key=lambda row: -row["probability"])  # which leaves equal ones as they are
    return rows


def answer_row(name: object, context: str, prediction: Prediction, decoding: Decoding, **more: object) -> dict:
    """What is said about one example: the answer, how sure it is, several answers, more, and the n best."""
    span, candidates = answer(prediction, decoding.threshold), n_best(context, prediction, decoding)
    start, end = span[:2] if span else (None, None)
    probability = next((row["probability"] for row in candidates if (row["start"], row["end"]) == (start, end)), 1.0)
    p = no_answer_probability(prediction, decoding)
    several = several_answers(prediction, decoding)
    return {
        "id": name,
        "answer": context[start:end] if span else "",
        "start": start,
        "end": end,
        "probability": round(probability, 6),
        "difference": round(prediction.difference, 6) if prediction.spans else None,
        "no_answer_probability": None if p is None else round(p, 6),
        "answers": [{"text": context[s.start : s.end], "start": s.start, "end": s.end} for s in several],
        **more,
        "n_best": candidates,
    }
