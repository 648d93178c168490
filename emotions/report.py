"""Tables for people: the data before training, a run's scores after it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from emotions.config import Config
from emotions.dataset import Split, absent, positives, repeated_in_test
from emotions.labels import groupings

METRICS = [f"{name}_{mean}" for mean in ("macro", "micro", "weighted") for name in ("f1", "precision", "recall")]
METRICS.insert(1, "f1_macro_occurring")


def first_three(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined; a text stays in its cell."""
    cells = [list(map(cell, header)), ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else cell(str(c)) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def cell(text: str) -> str:
    """On one line, and nothing in it that ends a cell or that Markdown takes for HTML, a link or an image."""
    return " ".join(text.split()).translate({ord(mark): f"&#{ord(mark)};" for mark in "|<&["})


def print_summary(splits: dict[str, Split], config: Config) -> None:
    """The tables of what is trained on: rows, sources, labels, lengths in tokens; each label's rows."""
    from common.metrics import too_few  # scikit-learn, a second that --help has no use for

    columns = ["split", "rows", "sources", "labels a row", "without label", "tokens p50", "p95", "max"]
    rows = []
    for name, split in splits.items():
        sources = ", ".join(sorted({row.source or "-" for row in split.rows}))
        sizes = split.labels.sum(axis=1)
        percentiles = np.percentile(split.lengths, (50, 95, 100)).astype(int).tolist()
        cut = int((split.lengths > config.max_length).sum())
        rows.append([name, len(split), sources, f"{sizes.mean():.2f}", int((sizes == 0).sum()), *percentiles, cut])
    print("\n".join(table([*columns, f"cut to {config.max_length}"], rows)[:-1]))

    counts = [split.labels.sum(axis=0).tolist() for split in splits.values()]
    known = splits["train"].known.sum(axis=0).tolist()
    names = splits["train"].names
    print("\n".join(table(["label", *splits, "known in train"], list(zip(names, *counts, known)))[:-1]))

    if missing := absent(splits["train"]):
        print(f"no training row has {first_three(missing)}: not learned; a labels.txt without them leaves them out")
    for name in list(splits)[1:]:
        if missing := absent(splits[name]):
            print(f"{name} has no positive of {first_three(missing)}: each counts as 0 in f1_macro")
    if few := too_few(len(splits["validation"]), positives(splits["validation"])):
        print(f"validation: {few}")
    if untaught := [name for name, count in zip(names, known) if count == 0]:
        print(f"no training row knows {', '.join(untaught)}: never predicted")
    if "test" not in splits:
        print("no test file: no test figure will be reported")
    elif seen := repeated_in_test(splits):
        print(f"{seen} of the {len(splits['test'])} test texts are also in validation")
    if unread := Counter(key for split in splits.values() for row in split.rows for key in row.unread):
        keys = [f"{repr(key)[1:-1]:.40} ({count} rows)" for key, count in unread.most_common()]
        print(f"keys that nobody reads: {first_three(keys)}")
    print("rows dropped: 0 (blank lines are skipped, a bad row ends the run)")


def evaluation_line(epoch: int, scores: dict, shared_threshold: float, better: bool) -> str:
    """What is printed after an evaluation in training."""
    return (
        f"epoch {epoch} | train loss {scores['train_loss']:.4f} | validation loss {scores['loss']:.4f} | "
        f"f1_macro {scores['f1_macro']:.4f} at {shared_threshold:.3f}, {scores['f1_macro_at_half']:.4f} at .5 | "
        f"map {scores['map']:.4f}{' | best' * better}"
    )


def last_line(results: dict, path: str) -> str:
    """What a finished run prints last, and again when it is started once more."""
    validation, test = results["validation"], results["test"]
    few = validation.get("too_few")  # older results have no such key
    choice = f"epoch {results['epoch']}; {few}" if few else f"epoch {results['epoch']}"
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} ({choice})"]
    honest = validation["cross_fitted"]["at_per_label"]
    parts.append(f"validation f1_macro {honest['f1_macro']:.4f} with cross-fitted thresholds")
    parts[-1] += without_absent(validation, honest)
    if test:
        half, tuned = (test[key]["f1_macro"] for key in ("at_half", "at_per_label"))
        parts.append(f"test f1_macro {half:.4f} at .5, {tuned:.4f} at the tuned thresholds")
        parts[-1] += without_absent(test, test["at_per_label"])
    if validation.get("one_answer") is not None:
        parts.append("every text gets the same labels: report.md says why that can be")
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {path}"])


def without_absent(scores: dict, metrics: dict) -> str:
    """What to say beside an f1_macro of a split in which labels are absent: the mean over the others."""
    if not (missing := scores.get("absent")):
        return ""
    mean = metrics["f1_macro_occurring"]
    return f" ({'-' if mean is None else f'{mean:.4f}'} without {first_three(missing)}, of which it has no positive)"


def report(
    scores: dict, splits: dict[str, Split], evaluations: list[dict], errors: list[str], config: Config
) -> str:
    """report.md; its detail is of the test split, or of validation where there is no test.

    evaluations: those of metrics.jsonl; errors: worst_errors of the same split.
    """
    detail = "test" if "test" in splits else "validation"
    lines = [f"# {config.model} on {config.data_dir}", ""]
    lines += ["The epoch and all thresholds were chosen on validation, so its rows marked tuned flatter. Those marked "]
    lines[-1] += "cross-fitted (thresholds tuned on four fifths, scored on the last, in turn) owe only the epoch to it."
    if detail == "test":
        seen = f"{repeated_in_test(splits)} of its {len(splits['test'])} texts"
        lines += [f"Nothing was chosen on test; {seen} are also in validation.", ""]
    else:
        lines += ["There is no test split: no test figure.", ""]
    if few := scores["validation"]["too_few"]:
        lines += [f"Validation: {few}.", ""]
    for name in list(splits)[1:]:
        if missing := scores[name]["absent"]:
            counted = "each counts as 0 in f1_macro. The mean over the others is f1_macro_occurring."
            lines += [f"{name.capitalize()} has no positive of {first_three(missing)}: {counted}", ""]

    if (answered := scores["validation"]["one_answer"]) is not None:
        same = f"the same labels ({', '.join(answered) or 'none'})"
        lines += [f"Every text of validation gets {same}: the model has learned how frequent labels are and no more. "]
        lines[-1] += f"With init random (here {config.init}) more epochs (here {config.epochs}) and a learning_rate of "
        lines[-1] += f"1e-3 to 5e-3 (here {config.learning_rate:g}) can help, and pretrained weights do.\n"

    # All splits at all thresholds
    lines += ["## Scores", "", *table(*score_rows(scores))]

    # One split in detail, and the epochs
    lines += details(detail, scores)
    columns = ["epoch", "step", "train_loss", "loss", "map", "f1_macro_at_half", "f1_macro"]
    lines += ["## Epochs (validation; f1_macro at the shared threshold that is best there)", ""]
    lines += table(columns, [[record[column] for column in columns] for record in evaluations])
    return "\n".join(lines + errors)


def details(split: str, scores: dict) -> list[str]:
    """A split's groups of labels and its labels, as tables."""
    lines = []
    for name in groupings(tuple(scores["thresholds"]["per_label"])):
        groups = scores[split][name]["at_per_label"]["per_label"]
        rows = [[group, *metrics.values()] for group, metrics in groups.items()]
        lines += [f"## {split}: {name}, per-label thresholds", ""]
        lines += table(["group", "precision", "recall", "f1", "support"], rows)

    at_half, at_shared, own = (scores[split][rule]["per_label"] for rule in ("at_half", "at_shared", "at_per_label"))
    thresholds = scores["thresholds"]["per_label"]
    columns = ["label", "precision", "recall", "f1", "support", "threshold", "f1 at .5", "f1 at shared"]
    rows = [
        [name, *metrics.values(), thresholds[name], at_half[name]["f1"], at_shared[name]["f1"]]
        for name, metrics in own.items()
    ]
    return [*lines, f"## {split}: labels", "", *table(columns, rows)]


def worst_errors(split: Split, probability: np.ndarray, thresholds: np.ndarray) -> list[str]:
    """The texts with a wrong label, those first of whose wrong labels one's truth had the lowest probability.

    probability: (N, L); thresholds: (L,). What a row does not know is not wrong.
    """
    wrong = ((probability >= thresholds) != split.labels) & split.known
    of_truth = np.where(wrong, np.where(split.labels, probability, 1 - probability), 2.0)  # (N, L), 2: not wrong
    order = np.argsort(of_truth.min(axis=1), kind="stable")[: min(30, int(wrong.any(axis=1).sum()))]
    rows = []
    for n in order.tolist():
        row, label = split.rows[n], int(of_truth[n].argmin())
        text = row.text if len(row.text) <= 1000 else f"{row.text[:1000]}… (+{len(row.text) - 1000} characters)"
        places = (np.flatnonzero(wrong[n] & (split.labels[n] == there)) for there in (True, False))
        missed, added = ([split.names[place] for place in part] for part in places)
        worst = f"{split.names[label]} {probability[n, label]:.4f}"
        rows.append([row.line, text, ", ".join(missed) or "-", ", ".join(added) or "-", worst])
    if not rows:
        return ["## The worst errors", "", "None: every text has its labels."]
    return [
        *(f"## The {len(rows)} worst errors", ""),
        *table(["line", "text", "labels missed", "labels too many", "probability of the worst"], rows),
    ]


def score_rows(scores: dict) -> tuple[list[str], list[list]]:
    """The columns, and a row for each split and way to set the thresholds; validation's were tuned on itself."""
    columns = ["split", "thresholds", *METRICS, "map", "labels true", "labels predicted"]
    rows, shared = [], f"{scores['thresholds']['shared']:.4f}"
    for split in [name for name in scores if name != "thresholds" and scores[name]]:
        tuned = "tuned" if split == "validation" else "tuned on validation"
        ways = {".5": "at_half", f"{shared}, {tuned}": "at_shared", f"per label, {tuned}": "at_per_label"}
        ways = {title: scores[split][rule] for title, rule in ways.items()}
        if split == "validation":
            honest = scores[split]["cross_fitted"]
            ways |= {"one, cross-fitted": honest["at_shared"], "per label, cross-fitted": honest["at_per_label"]}
        for title, metrics in ways.items():
            cardinality = [metrics["cardinality_true"], metrics["cardinality_predicted"]]
            rows.append([split, title, *(metrics[name] for name in METRICS), scores[split]["map"], *cardinality])
    return columns, rows
