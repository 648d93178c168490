"""Tables for people: what is trained on, and what a run scored."""

from collections import Counter
from itertools import product

import numpy as np

from redsm5_nli.config import Config
from redsm5_nli.criteria import Criterion
from redsm5_nli.dataset import LABELS, Split

RULES = {"at_half": ".5", "at_global": "one threshold", "at_criteria": "a threshold for each criterion"}
COLUMNS = ("accuracy", "f1_macro", "f1_positive")


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined; a text stays in its cell."""
    cells = [[cell(name) for name in header], ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else cell(str(c)) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def cell(text: str) -> str:
    """On one line, and nothing in it that ends a cell or that Markdown takes for HTML, a link or an image."""
    return " ".join(text.split()).translate({ord(mark): f"&#{ord(mark)};" for mark in "|<&["})


def print_summary(
    splits: dict[str, Split], kinds: Counter, unread: Counter, criteria: tuple[Criterion, ...], config: Config
) -> None:
    """What is trained on: posts, pairs, lengths in tokens, positive pairs of each criterion, annotation rows.

    unread: for each column that nobody reads its rows.
    """
    rows = []
    for name, split in splits.items():
        labels = split.labels  # (P, C)
        percentiles = np.percentile(split.lengths, (50, 95, 100)).astype(int).tolist()
        without = int((labels.sum(1) == 0).sum())
        counts = [len(split.posts), without, labels.size, int(labels.sum()), f"{labels.mean():.1%}"]
        rows.append([name, *counts, *percentiles, split.cut])
    header = ["split", "posts", "with no criterion", "pairs", "positive", "share", "tokens p50", "p95", "max"]
    print("\n".join(table([*header, f"posts cut to {config.max_length}"], rows)[:-1]))

    positives = np.stack([split.labels.sum(0) for split in splits.values()], 1).tolist()  # (C, splits)
    counts = [[criterion.id, *row] for criterion, row in zip(criteria, positives)]
    print("\n".join(table(["positive pairs", *splits], counts)[:-1]))
    print(f"annotations: {', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}; a bad row would end the run")
    if unread:
        print(unread_line(unread))
    for number, name in enumerate(splits):
        if absent := [criterion.id for criterion, row in zip(criteria, positives) if row[number] == 0]:
            print(f"no positive pair in {name}: {', '.join(absent)} (an id is a DSM5_symptom of the annotations)")
    if few := few_pairs(*np.bincount(splits["validation"].labels.ravel(), minlength=len(LABELS)).tolist()):
        print(f"validation pairs: {few}")


def unread_line(counts: Counter) -> str:
    return "keys that nobody reads: " + ", ".join(f"{key} ({count} rows)" for key, count in counts.most_common())


def few_pairs(*counts: int) -> str | None:
    """What to say of so many pairs of each label that are too few to choose an epoch or a threshold by."""
    from common.metrics import too_few  # scikit-learn: a second that --help has no use for

    return too_few(sum(counts), dict(zip(LABELS, counts)))


def cautions(results: dict) -> list[str]:
    """What to say beside the scores of a run: too few validation pairs, criteria without a positive pair."""
    pairs = results["validation"]["at_half"]["per_class"]
    few = few_pairs(*(pairs[label]["support"] for label in LABELS))
    found = [f"validation pairs: {few}"] if few else []
    for split in ("validation", "test"):
        means = results[split]["at_half"]["criteria"]
        rows = means["per_label"].items()
        if absent := [criterion for criterion, row in rows if not row["support"]]:
            occurring = np.mean([row["f1"] for _, row in rows if row["support"]])
            found.append(
                f"no positive pair in {split}: {', '.join(absent)}; mean f1 of the criteria at .5 "
                f"{means['f1_macro']:.4f} with 0 there, {occurring:.4f} over those that occur"
            )
    return found


def evaluation_line(epoch: int, scores: dict, better: bool) -> str:
    """What is printed after an evaluation in training."""
    return (
        f"epoch {epoch} | train loss {scores['train_loss']:.4f} | validation loss {scores['loss']:.4f} | "
        f"f1_macro {scores['f1_macro']:.4f} | f1_positive {scores['f1_positive']:.4f}{' | best' * better}"
    )


def last_line(results: dict, path: str) -> str:
    """What a finished run prints last, and again when it is started once more."""
    validation, test = (results[name]["at_half"]["f1_positive"] for name in ("validation", "test"))
    tuned = results["test"]["at_global"]["f1_positive"]
    scores = (
        f"{results['split']} {results['metric']} {results['best']:.4f}, f1_positive {validation:.4f} "
        f"(epoch {results['epoch']}) | test f1_positive {test:.4f} at .5, {tuned:.4f} at the tuned threshold "
        f"{results['thresholds']['global']:.4f}"
    )
    return " | ".join(["done", scores, *cautions(results), f"{results['seconds']:.0f} s", f"results in {path}"])


def pair_tables(scores: dict[str, dict]) -> list[str]:
    """Over all pairs: scores by split and threshold, areas and loss by split."""
    by_rule, areas = [], []
    for name, (key, rule) in product(scores, RULES.items()):
        row, tuned_here = scores[name][key], name == "validation" and key != "at_half"
        values = [row[column] for column in COLUMNS]
        means = [row["criteria"][mean] for mean in ("f1_macro", "f1_macro_occurring")]
        by_rule.append([name, rule + ", tuned here" * tuned_here, *values, *means])
    for name in scores:
        areas.append([name, *(scores[name][column] for column in ("auprc", "auc", "loss"))])
    header = ["split", "threshold", *COLUMNS, "mean f1 of the criteria", "of those that occur"]
    return ["## All pairs", "", *table(header, by_rule), *table(["split", "auprc", "auc", "loss"], areas)]


def criterion_tables(name: str, scores: dict, thresholds: dict) -> list[str]:
    """Of one split: a line for each criterion, and their mean."""
    lines, columns = [], ("precision", "recall", "f1", "support")
    per_label = scores["at_half"]["criteria"]["per_label"]
    if absent := [criterion for criterion, row in per_label.items() if not row["support"]]:
        lines += [f"{name} has no positive pair of {', '.join(absent)}, which are 0 in the means.", ""]
    for key, rule in RULES.items():
        means, rows = scores[key]["criteria"], []
        for criterion, row in means["per_label"].items():
            threshold = {"at_half": 0.5, "at_global": thresholds["global"]}.get(key, thresholds["criteria"][criterion])
            rows.append([criterion, threshold, *(row[column] for column in columns)])
        rows.append(["mean", "", *(means[f"{column}_macro"] for column in columns[:3]), ""])
        rows += [["mean of those that occur", "", "", "", means["f1_macro_occurring"], ""]] if absent else []
        lines += [f"## {name}, {rule}", "", *table(["criterion", "threshold", *columns], rows)]
    return lines


def report(scores: dict, splits: dict[str, Split], evaluations: list[dict], config: Config) -> str:
    """The readable evaluation, in Markdown."""
    cut = ", ".join(f"{name} {n} of {len(splits[name].posts)}" for name, n in scores["posts_cut"].items())
    lines = [
        "# Does the post show the criterion?",
        "",
        f"{config.model}, {config.adapter} of rank {config.rank}, {config.pooler} pooling.",
        "Epoch and thresholds were chosen on validation; test is only reported.",
        f"Posts that lost their tail at max_length {config.max_length}: {cut}.",
        *(f"{caution[0].upper()}{caution[1:]}." for caution in cautions(scores)),
        "This is a text classifier and gives no diagnosis.",
        "",
    ]
    lines += pair_tables({name: scores[name] for name in ("validation", "test")})
    lines += criterion_tables("Test", scores["test"], scores["thresholds"])
    chosen_by, posts = scores["validation"]["at_half"]["criteria"]["per_label"], len(splits["validation"].posts)
    if few := [name for name, row in chosen_by.items() if few_pairs(posts - row["support"], row["support"])]:
        lines += [f"Of these thresholds too few validation pairs chose those of {', '.join(few)}.", ""]

    names = ["epoch", "step", "train_loss", "loss", *COLUMNS, "auprc"]
    epochs = [[row[name] for name in names] for row in evaluations]
    return "\n".join([*lines, "## Epochs (validation, threshold .5)", "", *table(names, epochs)])
