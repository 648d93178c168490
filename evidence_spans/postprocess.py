"""From logits to spans: the n best of each example, by their characters. answers.py makes answers of them.

B batch of windows, T tokens, n best spans, L tokens of the longest answer, S sentences
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evidence_spans.windows import Window, token_spans

SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"')\]”’]*+(?=\s)|[\r\n]+|\Z")


class Span(NamedTuple):
    """Characters of the context, the end exclusive; score: start logit + end logit."""

    start: int
    end: int
    score: float


class Prediction(NamedTuple):
    """null_score: the smallest of the windows' [CLS] scores; spans: the n best, best first."""

    null_score: float
    spans: list[Span]

    @property
    def difference(self) -> float:
        """How much "no answer" outscores the best span; inf where no span is allowed."""
        return self.null_score - self.spans[0].score if self.spans else float("inf")


def sliding_maximum(values: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, T): the maximum of each value and the width - 1 after it, in log2(width) passes."""
    covered = 1
    while covered < width:
        step = min(covered, width - covered)
        values = torch.maximum(values, F.pad(values, (0, step), value=-torch.inf)[:, step:])
        covered += step
    return values


def best_pairs(
    start_logits: Tensor, end_logits: Tensor, context_mask: Tensor, n: int, max_answer_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, starts and ends (inclusive) of each window's n best pairs, (B, n), best first; -inf: there are fewer.

    Logits and mask (B, T). A pair starts and ends in the context and holds 1 to max_answer_length tokens. Exact: a pair
    whose start is not among the n starts that are best with their best partner is outscored by a pair of each of them.
    """
    length = start_logits.shape[1]
    width = min(max_answer_length, length)
    start = start_logits.float().masked_fill(~context_mask, -torch.inf)
    end = end_logits.float().masked_fill(~context_mask, -torch.inf)
    starts = (start + sliding_maximum(end, width)).topk(min(n, length)).indices  # (B, n)
    partners = F.pad(end, (0, width - 1), value=-torch.inf).unfold(1, width, 1)  # (B, T, L), a view
    partners = partners.gather(1, starts[:, :, None].expand(-1, -1, width))  # (B, n, L)
    scores = (start.gather(1, starts)[:, :, None] + partners).flatten(1)  # (B, n L)
    scores, places = scores.topk(min(n, scores.shape[1]))
    starts = starts.gather(1, places // width)
    return scores, starts, starts + places % width


def sentences(text: str) -> list[tuple[int, int]]:
    """Characters of each sentence: up to . ! or ? before white space, or to the end of a line, without outer blanks."""
    spans, start = [], 0
    for match in SENTENCE_END.finditer(text):
        part = text[start : match.end()]
        if stripped := part.strip():
            first = start + len(part) - len(part.lstrip())
            spans.append((first, first + len(stripped)))
        start = match.end()
    return spans


def sentence_pairs(
    start_logits: Tensor, end_logits: Tensor, windows: Sequence[Window], contexts: Sequence[str], n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As best_pairs, but a pair is a sentence of the window's context, of those that the window's edges do not cut."""
    shape = len(windows), n
    scores, places = torch.full(shape, -torch.inf), torch.zeros(2, *shape, dtype=torch.long)
    for row, (window, context) in enumerate(zip(windows, contexts)):
        starts, ends = tokens = torch.from_numpy(token_spans(window, sentences(context))).T  # (2, S)
        candidates = start_logits[row, starts].float() + end_logits[row, ends].float()
        kept = min(n, len(candidates))
        scores[row, :kept], order = candidates.cpu().topk(kept)
        places[:, row, :kept] = tokens[:, order]
    return scores, *places


def window_predictions(
    windows: Sequence[Window], null_scores: Tensor, scores: Tensor, starts: Tensor, ends: Tensor
) -> list[Prediction]:
    """Each window's prediction: from token positions (B, n), as best_pairs gives them, to characters."""
    pairs = (part.cpu().numpy() for part in (scores, starts, ends))
    predictions = []
    for window, null_score, *row in zip(windows, null_scores.tolist(), *pairs):
        score, start, end = (part[row[0] > -np.inf] for part in row)
        start, end = window.offsets[start - window.first, 0], window.offsets[end - window.first, 1]
        predictions.append(Prediction(null_score, [*map(Span, start.tolist(), end.tolist(), score.tolist())]))
    return predictions


def merge_windows(parts: Sequence[Prediction], n: int) -> Prediction:
    """One example's prediction from those of its windows. A span that several of them hold keeps its best score."""
    best: dict[tuple[int, int], Span] = {}
    for span in sorted((span for part in parts for span in part.spans), key=lambda span: -span.score):
        if span.start < span.end:  # not where the only token is a blank
            best.setdefault(span[:2], span)
    return Prediction(min(part.null_score for part in parts), list(best.values())[:n])
