"""What a model got wrong, for report.md and report.html: the worst first."""

from typing import NamedTuple

from evidence_spans.formats import Example
from evidence_spans.marks import LEGEND, marked, section
from evidence_spans.report import table

SHOWN, AROUND, CHARACTERS = 30, 80, 1000  # errors; characters beside a span, and of a cell


class Error(NamedTuple):
    """A wrong answer: none where found is empty; probability is that of the right one among the n best."""

    example: Example
    found: list[tuple[int, int]]
    probability: float


def worst_errors(examples: list[Example], rows: list[dict]) -> list[Error]:
    """The wrong answers, those first whose right one had the lowest probability. rows: as answer_row gives them."""
    from common.metrics import answer_scores

    errors = []
    for example, row in zip(examples, rows):
        if not answer_scores(row["answer"], example.texts)[0]:
            right = [r["probability"] for r in row["n_best"] if answer_scores(r["text"], example.texts)[0]]
            found = [(row["start"], row["end"])] if row["start"] is not None else []
            errors.append((Error(example, found, max(right, default=0.0)), -row["probability"]))
    return [error for error, _ in sorted(errors, key=lambda pair: (pair[0].probability, pair[1]))]


def in_context(text: str, spans: list[tuple[int, int]]) -> str:
    """The spans in » « with what stands beside them; "none" where there are none."""
    parts = []
    for start, end in spans:
        before, after = text[max(start - AROUND, 0) : start], text[end : end + AROUND]
        dots = "… " * (start > AROUND), " …" * (end + AROUND < len(text))
        parts.append(f"{dots[0]}{before}»{text[start:end]}«{after}{dots[1]}")
    return shortened(" / ".join(parts)) or "none"


def shortened(text: str) -> str:
    left_out = len(text) - CHARACTERS
    return text if left_out <= 0 else f"{text[:CHARACTERS]}… (+{left_out:,} characters)"


def error_lines(errors: list[Error], name: str) -> list[str]:
    """The worst errors in Markdown; name: of the split."""
    rows = [
        [e.id, shortened(e.question), in_context(e.context, e.answers), in_context(e.context, found), probability]
        for e, found, probability in errors[:SHOWN]
    ]
    lines = [f"## The {SHOWN} worst errors", "", f"{len(errors)} answers of {name} are wrong.", ""]
    return lines + (table(["example", "question", "gold", "found", "probability of gold"], rows) if rows else [])


def error_page(errors: list[Error], name: str) -> str:
    """The worst errors in HTML, gold and found marked in their texts."""
    parts = [f"<h2>The {SHOWN} worst errors</h2>", f"<p>{len(errors)} answers of {name} are wrong.</p>", LEGEND]
    for example, found, probability in errors[:SHOWN]:
        title = f"{example.id} | {shortened(example.question)} | probability of gold {probability:.4f}"
        parts.append(section(title, marked(example.context, [*example.answers], found, 4 * AROUND)))
    return "\n".join(parts)
