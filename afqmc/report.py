"""Tables for people: the data before training, a run's scores after it."""

from collections import Counter

import numpy as np

from afqmc.config import Config
from afqmc.dataset import LABELS, Split, count_unread, repeated_in_test

WRITING = " (case, width, punctuation and order aside)"  # when pairs are the same, as same_text has it


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined."""
    cells = [header, ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def print_summary(splits: dict[str, Split], config: Config) -> None:
    """The table of what is trained on: rows, label shares, lengths in tokens."""
    rows = []
    for name, (pairs, lengths, labels) in splits.items():
        percentiles = np.percentile(lengths, (50, 95, 99, 100)).astype(int).tolist()
        share = int(labels.sum()) / len(pairs)
        rows.append([name, len(pairs), f"{share:.1%}", *percentiles, int((lengths > config.max_length).sum())])
    header = ["split", "rows", "label 1", "tokens p50", "p95", "p99", "max", f"cut to {config.max_length}"]
    print("\n".join(table(header, rows)[:-1]))
    print("rows dropped: 0 (blank lines are skipped, a bad row ends the run)")
    if small := small_split(*splits["validation"].labels.bincount(minlength=len(LABELS)).tolist()):
        print(f"validation: {small}")
    if unread := sum((count_unread(split.pairs) for split in splits.values()), Counter()):
        print(unread_line(unread))
    if "test" in splits and (seen := repeated_in_test(splits)):
        print(f"{seen} of the {len(splits['test'].pairs)} test pairs are also in train.json{WRITING}")


def small_split(*counts: int) -> str | None:
    """What to say of a split with so few rows of each label that nothing should be chosen by it."""
    from common.metrics import too_few  # scikit-learn: a second that --help has no use for

    return too_few(sum(counts), {f"label {name}": count for name, count in zip(LABELS, counts)})


def unread_line(counts: Counter) -> str:
    return "keys that nobody reads: " + ", ".join(f"{key} ({count} rows)" for key, count in counts.most_common())


def evaluation_line(epoch: int, scores: dict, better: bool) -> str:
    """What is printed after an evaluation in training."""
    return (
        f"epoch {epoch} | train loss {scores['train_loss']:.4f} | validation loss {scores['loss']:.4f} | "
        f"f1_macro {scores['f1_macro']:.4f} | accuracy {scores['accuracy']:.4f}{' | best' * better}"
    )


def last_line(results: dict, path: str) -> str:
    """What a finished run prints last, and again when it is started once more."""
    small = small_split(*supports(results["validation"]["at_half"]))
    choice = f"epoch {results['epoch']}{f'; {small}' if small else ''}"
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} ({choice})"]
    if results["test"]:
        half, tuned = (f1_macro(results["test"][key]) for key in ("at_half", "at_threshold"))
        parts.append(f"test f1_macro {half} at .5, {tuned} at the tuned threshold {results['threshold']:.4f}")
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {path}"])


def supports(metrics: dict) -> list[int]:
    """The scored rows of each label."""
    return [metrics["per_class"][name]["support"] for name in LABELS]


def f1_macro(metrics: dict) -> str:
    """Macro-F1; where a label has no row, which counts as an F1 of 0, that is said beside the F1 of the other."""
    figure, per_class = f"{metrics['f1_macro']:.4f}", metrics["per_class"]
    for name, other in (LABELS, LABELS[::-1]):
        if not per_class[name]["support"]:
            return f"{figure} ({per_class[other]['f1']:.4f} without label {name}, which no row has)"
    return figure


def report(scores: dict, splits: dict[str, Split], evaluations: list[dict], config: Config) -> str:
    """report.md; its detail is of the test split, or of validation where there is no test.

    evaluations: those of metrics.jsonl.
    """
    threshold, detail = scores["threshold"], "test" if "test" in splits else "validation"
    lines = [f"# {config.model} on {config.data_dir}", ""]
    lines += ["The epoch and the tuned threshold were chosen on validation, so its own row at that threshold flatters."]
    if small := small_split(*supports(scores["validation"]["at_half"])):
        lines += [f"Validation has {small}."]
    if detail == "test":
        seen = f"{repeated_in_test(splits)} of its {len(splits['test'].pairs)} pairs"
        lines += [f"Nothing was chosen on test; {seen} are also in train.json{WRITING}.", ""]
    else:
        lines += ["There is no test split (no dev.json): no figure below is an unbiased estimate.", ""]

    # All splits at both thresholds
    columns = ["accuracy", "f1_weighted"]
    rows = [
        [name, label, f1_macro(scores[name][key]), *(scores[name][key][c] for c in columns), scores[name]["loss"]]
        for name in splits
        if name != "train"
        for label, key in (("0.5", "at_half"), (f"{threshold:.4f}, tuned on validation", "at_threshold"))
    ]
    lines += table(["split", "threshold", "f1_macro", *columns, "loss"], rows)

    # One split in detail, and the epochs
    lines += [f"## {detail}, threshold 0.5", "", *class_tables(scores[detail]["at_half"])]
    if threshold != 0.5:
        lines += [f"## {detail}, threshold {threshold:.4f}", "", *class_tables(scores[detail]["at_threshold"])]
    columns = ["epoch", "step", "train_loss", "loss", "f1_macro", "accuracy"]
    lines += ["## Epochs (validation)", "", *table(columns, [[row[c] for c in columns] for row in evaluations])]
    return "\n".join(lines)


def class_tables(metrics: dict) -> list[str]:
    """Per-class scores, the confusion matrix with row recall and column precision, and the kinds of mistake."""
    columns = ["precision", "recall", "f1", "support"]
    per_class = metrics["per_class"]
    lines = table(["label", *columns], [[name, *(per_class[name][c] for c in columns)] for name in LABELS])
    matrix = metrics["confusion_matrix"]
    rows = [[f"true {name}", *matrix[i], per_class[name]["recall"]] for i, name in enumerate(LABELS)]
    rows.append(["precision", *(per_class[name]["precision"] for name in LABELS), ""])
    lines += table(["", *(f"predicted {name}" for name in LABELS), "recall"], rows)
    (_, false_positives), (false_negatives, _) = matrix
    shares = f"{false_positives / metrics['rows']:.1%}) and {false_negatives} false negatives ("
    lines += [f"{false_positives} false positives ({shares}{false_negatives / metrics['rows']:.1%}) of all rows.", ""]
    return lines
