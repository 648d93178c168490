"""Tables for people: the data as a run sees it, and report.md."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from embeddings.batching import Epoch
from embeddings.config import Config
from embeddings.dataset import Splits, repeated_in_test


def table(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined."""
    cells = [header, ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def unread_line(unread: Counter[str]) -> str:
    """The keys or columns that nobody reads, and how many rows have each."""
    return f"keys that nobody reads: {', '.join(f'{name} ({count} rows)' for name, count in unread.items())}"


def few_pairs(pairs: int) -> str | None:
    """What to say where the step is chosen by too few pairs."""
    from common.metrics import too_few  # scikit-learn takes a second

    return (few := too_few(pairs, {})) and f"validation has {few}"


def print_summary(splits: Splits, lengths: np.ndarray, anchors: np.ndarray, missed: int, config: Config) -> None:
    """The data as the run sees it.

    lengths: of the distinct training texts; anchors: each row's, as a number; missed: rows that no step takes.
    """
    percentiles = np.percentile(lengths, (50, 95, 100)).astype(int).tolist()
    kind = "triplets" if splits.train[0].negative else "pairs"
    columns = [f"training {kind}", "distinct texts", "tokens p50", "p95", "max"]
    columns.append(f"cut to {config.max_length}, or as long")
    cut = int((lengths == config.max_length).sum())
    print("\n".join(table(columns, [[len(splits.train), len(lengths), *percentiles, cut]])[:-1]))
    if repeated := len(anchors) - len(np.unique(anchors)):
        print(f"{repeated} rows repeat another row's anchor: never in one batch with it")

    lines = []
    for name, pairs in (("validation", splits.validation), ("test", splits.test)):
        if pairs:
            scores = [pair.score for pair in pairs]
            spread = " / ".join(f"{value:.1f}" for value in np.percentile(scores, [5, 50, 95]))
            lines.append([name, len(pairs), f"{np.mean(scores):.2f}", spread])
    print("\n".join(table(["judged pairs", "rows", "mean score", "scores 5 / 50 / 95 %"], lines)[:-1]))
    if not splits.test:
        print("no sts-test.csv: no test figure will be reported")
    elif repeated := repeated_in_test(splits):
        print(f"{repeated} of the {len(splits.test)} test pairs are also in sts-dev.csv")
    if few := few_pairs(len(splits.validation)):
        print(few)
    if splits.unread:
        print(unread_line(splits.unread))
    print(f"{missed} training rows are in no batch of the {config.max_steps} steps")
    if config.max_steps < config.warmup_steps:
        steps = f"{config.max_steps} of {config.warmup_steps} warmup_steps"
        print(f"warning: the learning rate never reaches its peak: the run ends after {steps}")


def epoch_line(number: int, epoch: Epoch, steps: int) -> str:
    """What an epoch takes and what it leaves out; steps: from its first batch to the end of the run."""
    batches = len(epoch.batches)
    line = f"epoch {number} | {sum(map(len, epoch.batches[:steps]))} rows in {min(steps, batches)} batches"
    if steps < batches:
        return f"{line} of {batches}, then the run ends"
    next_epoch = f", which come first in epoch {number + 1}: texts repeat" if epoch.first_in_next else ""
    return f"{line} | {len(epoch.left_out)} left out{next_epoch if steps > batches else ''}"


def evaluation_line(step: int, scores: dict, better: bool) -> str:
    """What is printed after an evaluation in training."""
    figures = f"validation spearman {scores['spearman']:.4f} | pearson {scores['pearson']:.4f}"
    return f"step {step} | {figures}{' | best' * better}"


def last_line(results: dict, path: str) -> str:
    """What a finished run prints last, and again when it is started once more."""
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} (step {results['step']})"]
    parts += [few] if (few := few_pairs(results["validation"]["pairs"])) else []
    parts.append(f"{results['base']:.4f} without adapter")
    parts += [f"test spearman {results['test']['spearman']:.4f}"] if results["test"] else []
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {path}"])


def report(scores: dict[str, dict | None], splits: Splits, evaluations: list[dict], config: Config) -> str:
    """report.md. scores: of each split; evaluations: those of metrics.jsonl."""
    lines = [f"# {config.model} on {config.data_dir}", ""]
    lines += ["Correlation of the cosine with people's scores. The step was chosen on validation: its row flatters."]
    lines += [f"**{few.capitalize()}.**"] if (few := few_pairs(len(splits.validation))) else []
    lines += [f"These are of the model in best/ as it is saved, adapter merged, computed with amp {config.amp}."]
    if splits.test:
        repeated = f"{repeated_in_test(splits)} of its {len(splits.test)} pairs"
        lines += [f"Nothing was chosen on test; {repeated} are also in sts-dev.csv.", ""]
    else:
        lines += ["There is no test split: no test figure.", ""]
    columns = ["pairs", "spearman", "pearson"]
    rows = [[name, *(values[column] for column in columns)] for name, values in scores.items() if values]
    lines += table(["split", *columns], rows)
    columns = ["step", "epoch", "spearman", "pearson"]
    lines += ["## Steps (validation, before merging, as the step was chosen; 0: without adapter)", ""]
    lines += table(columns, [[record[column] for column in columns] for record in evaluations])
    return "\n".join(lines)
