"""Tables for people: the data before training, a run's scores after it."""

from collections import Counter

import numpy as np

from afqmc.config import Config
from afqmc.dataset import Split, count_unread, listed, repeated_in_test

WRITING = " (case, width, punctuation and order aside)"  # when pairs are the same, as same_text has it


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined."""
    cells = [[cell(name) for name in header], ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else cell(str(c)) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def cell(text: str) -> str:
    """On one line, and nothing in it that ends a cell or that Markdown takes for HTML, a link or an image."""
    return " ".join(text.split()).translate({ord(mark): f"&#{ord(mark)};" for mark in "|<&["})


def print_summary(splits: dict[str, Split], config: Config) -> None:
    """The table of what is trained on: rows, label shares, lengths in tokens."""
    names, rows = splits["train"].names, []
    for name, split in splits.items():
        percentiles = np.percentile(split.lengths, (50, 95, 99, 100)).astype(int).tolist()
        cut = int((split.lengths > config.max_length).sum())
        rows.append([name, len(split.pairs), *label_shares(split), *percentiles, cut])
    header = ["split", "rows", *(f"label {name}" for name in names), "tokens p50", "p95", "p99", "max"]
    print("\n".join(table([*header, f"cut to {config.max_length}"], rows)[:-1]))
    print("rows dropped: 0 (blank lines are skipped, a bad row ends the run)")
    if small := small_split(dict(zip(names, label_counts(splits["validation"])))):
        print(f"validation: {small}")
    if (share := unknown_share(splits["train"])) > 0.05:
        print(f"{share:.0%} of the training tokens are [UNK]: the model's vocabulary lacks their characters")
    if unread := sum((count_unread(split.pairs) for split in splits.values()), Counter()):
        print(unread_line(unread))
    if "test" in splits and (seen := repeated_in_test(splits)):
        print(f"{seen} of the {len(splits['test'].pairs)} test pairs are also in train or validation{WRITING}")


def label_counts(split: Split) -> list[int]:
    return [int((split.labels == label).sum()) for label in range(len(split.names))]


def label_shares(split: Split) -> list[str]:
    """Of each label its rows and their share; "-" where there are no labels."""
    counts = label_counts(split)
    return [f"{count} ({count / len(split.pairs):.1%})" if any(counts) else "-" for count in counts]


def unknown_share(split: Split) -> float:
    return split.unknown / int(split.lengths.sum())


def small_split(counts: dict[str, int]) -> str | None:
    """What to say of a split with so few rows of each label that nothing should be chosen by it."""
    from common.metrics import too_few  # scikit-learn: a second that --help has no use for

    return too_few(sum(counts.values()), {f"label {name}": count for name, count in counts.items()})


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
    choice = "; ".join([f"epoch {results['epoch']}", *cautions(results)])
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} ({choice})"]
    if results["test"]:
        parts.append(f"test f1_macro {f1_macro(untuned(results['test']))}")
        if results["threshold"] is not None:
            tuned = f1_macro(results["test"]["at_threshold"])
            parts[-1] += f" at .5, {tuned} at the tuned threshold {results['threshold']:.4f}"
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {path}"])


def cautions(results: dict) -> list[str]:
    """What to say beside a run's validation score."""
    metrics = untuned(results["validation"])
    label, half = only_answer(metrics), " at .5" * ("at_half" in results["validation"])
    found = [small_split(supports(metrics)), label and f"every answer{half} is {label}: report.md says why that can be"]
    return [caution for caution in found if caution]


def untuned(scores: dict) -> dict:
    """A split's metrics at .5; of more labels than two, those of the most probable one."""
    return scores["at_half"] if "at_half" in scores else scores["most_probable"]


def supports(metrics: dict) -> dict[str, int]:
    """The scored rows of each label."""
    return {name: scores["support"] for name, scores in metrics["per_class"].items()}


def only_answer(metrics: dict) -> str | None:
    """The label that a model gives to every row; None where it gives several."""
    answered = [name for name, column in zip(metrics["per_class"], zip(*metrics["confusion_matrix"])) if any(column)]
    return answered[0] if len(answered) == 1 else None


def causes(train: Split, last: dict, config: Config) -> list[str]:
    """Why a model of this run can have learned one answer only, and what to try. last: the last evaluation."""
    found = []
    if config.fgm_epsilon:
        found.append(f"fgm_epsilon {config.fgm_epsilon} holds a random start there, and small encoders on few rows: 0")
    if config.init == "random" and config.learning_rate < 2e-4:
        found.append(f"learning_rate {config.learning_rate} is small for a random start: 2e-4 to 1e-3")
    if (share := unknown_share(train)) > 0.05:
        found.append(f"{share:.0%} of the tokens are [UNK]: a model whose vocabulary has them")
    if config.init == "random" and len(train.pairs) < 5000:
        found.append(f"{len(train.pairs)} training pairs are few for a random start: a pretrained --model")
    if config.patience and last["epoch"] < config.epochs:
        found.append(f"patience {config.patience} may have stopped it before it began to tell labels apart: 0")
    few = f"{last['step']} optimizer steps can be too few"
    return [*found, f"{few}: more epochs, a smaller batch_size, gradient_accumulation_steps 1, a higher learning_rate"]


def f1_macro(metrics: dict) -> str:
    """Macro-F1; where labels have no row, which counts as an F1 of 0, that is said beside the F1 of the others."""
    figure, absent = f"{metrics['f1_macro']:.4f}", [name for name, rows in supports(metrics).items() if not rows]
    if absent:
        return f"{figure} ({metrics['f1_macro_occurring']:.4f} without label {listed(absent)}, which no row has)"
    return figure


def report(
    scores: dict, splits: dict[str, Split], errors: list[list], evaluations: list[dict], config: Config
) -> str:
    """report.md; its detail is of the test split, or of validation where there is no test, and so are errors.

    evaluations: those of metrics.jsonl.
    """
    threshold, detail = scores["threshold"], "test" if "test" in splits else "validation"
    lines = [f"# {config.model} on {config.data_dir}", ""]
    chosen, there = ("epoch was", "") if threshold is None else ("epoch and the tuned threshold were", " at that one")
    lines += [f"The {chosen} chosen on validation, so its own row{there} flatters."]
    if small := small_split(supports(untuned(scores["validation"]))):
        lines += [f"Validation has {cell(small)}."]
    if detail == "test":
        seen = f"{repeated_in_test(splits)} of its {len(splits['test'].pairs)} pairs"
        lines += [f"Nothing was chosen on test; {seen} are also in train or validation{WRITING}.", ""]
    else:
        lines += ["There is no test split (no dev.json or test_fraction): no figure below is an unbiased estimate.", ""]
    if label := only_answer(untuned(scores["validation"])):
        half = " at .5" * (threshold is not None)
        lines += [f"Every validation row is given{half} label {cell(label)}. Why that can be, and what to try:", ""]
        lines += [*(f"- {cause}" for cause in causes(splits["train"], evaluations[-1], config)), ""]

    lines += score_table({name: scores[name] for name in splits if name != "train"}, threshold)
    lines += detail_tables(detail, scores[detail], threshold)
    columns = ["epoch", "step", "train_loss", "loss", "f1_macro", "accuracy"]
    lines += ["## Epochs (validation)", "", *table(columns, [[row[c] for c in columns] for row in evaluations])]
    return "\n".join(lines + errors_table(detail, errors))


def score_table(scores: dict[str, dict], threshold: float | None) -> list[str]:
    """Each split's scores, of two labels at both thresholds."""
    columns = ["accuracy", "f1_weighted"]
    rules = {"most_probable": "none"}
    if threshold is not None:
        rules = {"at_half": "0.5", "at_threshold": f"{threshold:.4f}, tuned on validation"}
    rows = [
        [name, rule, f1_macro(split[key]), *(split[key][column] for column in columns), split["loss"]]
        for name, split in scores.items()
        for key, rule in rules.items()
    ]
    return table(["split", "threshold", "f1_macro", *columns, "loss"], rows)


def detail_tables(name: str, scores: dict, threshold: float | None) -> list[str]:
    """One split label by label."""
    lines = [f"## {name}{'' if threshold is None else ', threshold 0.5'}", "", *class_tables(untuned(scores))]
    if threshold not in (None, 0.5):
        lines += [f"## {name}, threshold {threshold:.4f}", "", *class_tables(scores["at_threshold"])]
    return lines


def errors_table(name: str, errors: list[list]) -> list[str]:
    """The worst of the wrong answers with their texts. errors: rows as evaluate.worst_errors gives them."""
    if not errors:
        return [f"No answer on {name} is wrong.", ""]
    header = ["line", "sentence1", "sentence2", "label", "predicted", "probability of the label"]
    rows = [[line, cut(first), cut(second), *rest] for line, first, second, *rest in errors[:30]]
    return [f"## The {len(rows)} worst errors ({name}, of {len(errors)})", "", *table(header, rows)]


def cut(text: str) -> str:
    return text if len(text) <= 1000 else f"{text[:1000]}… (+{len(text) - 1000} characters)"


def class_tables(metrics: dict) -> list[str]:
    """Per-class scores, the confusion matrix with row recall and column precision, and the kinds of mistake."""
    columns = ["precision", "recall", "f1", "support"]
    per_class, matrix = metrics["per_class"], metrics["confusion_matrix"]
    lines = table(["label", *columns], [[name, *(scores[c] for c in columns)] for name, scores in per_class.items()])
    rows = [[f"true {name}", *matrix[i], per_class[name]["recall"]] for i, name in enumerate(per_class)]
    rows.append(["precision", *(scores["precision"] for scores in per_class.values()), ""])
    lines += table(["", *(f"predicted {name}" for name in per_class), "recall"], rows)
    if len(matrix) > 2:
        return lines
    (_, false_positives), (false_negatives, _) = matrix
    shares = f"{false_positives / metrics['rows']:.1%}) and {false_negatives} false negatives ("
    lines += [f"{false_positives} false positives ({shares}{false_negatives / metrics['rows']:.1%}) of all rows.", ""]
    return lines
