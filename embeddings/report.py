"""Tables for people: the data as a run sees it, and report.md."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from common.checkpoint.tokens import Tokens
from embeddings.batching import Epoch, Rows
from embeddings.config import Config
from embeddings.dataset import Splits, repeated_in_test


def table(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined; a text stays in its cell."""
    cells = [[cell(name) for name in header], ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else cell(str(c)) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def cell(text: str) -> str:
    """On one line, and nothing in it that ends a cell or that Markdown takes for HTML, a link or an image."""
    return " ".join(text.split()).translate({ord(mark): f"&#{ord(mark)};" for mark in "|<&["})


def errors_table(name: str, errors: list[dict]) -> list[str]:
    """The worst of the wrong answers with their texts. errors: rows as Dev.errors gives them."""
    if not errors:
        return [f"No answer on {name} is wrong.", ""]
    rows = [[cut(value) if isinstance(value, str) else value for value in row.values()] for row in errors[:30]]
    return [f"## The {len(rows)} worst errors ({name}, of {len(errors)})", "", *table([*errors[0]], rows)]


def cut(text: str) -> str:
    return text if len(text) <= 1000 else f"{text[:1000]}… (+{len(text) - 1000} characters)"


def unread_line(unread: Counter[str]) -> str:
    """The keys or columns that nobody reads, and how many rows have each."""
    return f"keys that nobody reads: {', '.join(f'{name} ({count} rows)' for name, count in unread.items())}"


def tables(rows: dict[str, dict]) -> list[str]:
    """Splits and what there is to say of each; those of which the same is said share a table."""
    lines = []
    for columns, group in groupby(rows.items(), lambda row: [*row[1]]):
        lines += table(["split", *columns], [[name, *cells.values()] for name, cells in group])
    return lines


def few_rows(rows: int) -> str | None:
    """What to say where the step is chosen by too few pairs or queries."""
    from common.metrics import too_few  # scikit-learn takes a second

    return (few := too_few(rows, {})) and f"validation has {few}"


def print_summary(splits: Splits, tokens: Tokens, dev_tokens: Tokens, rows: Rows, missed: int, config: Config) -> None:
    """The data as the run sees it.

    tokens, dev_tokens: of the distinct training texts, and of validation's; missed: rows that no step takes.
    """
    percentiles = np.percentile(tokens.lengths, (50, 95, 100)).astype(int).tolist()
    kind = "triplets" if rows.texts.shape[1] > 2 else "pairs"
    columns = [f"training {kind}", "distinct texts", "tokens p50", "p95", "max", f"cut to {config.max_length}"]
    cut, cut_dev = (int((some.whole > config.max_length).sum()) for some in (tokens, dev_tokens))
    print("\n".join(table(columns, [[len(splits.train), len(tokens), *percentiles, cut]])[:-1]))
    negatives = (rows.texts[:, 2:] >= 0).sum(1)
    if rows.texts.shape[1] > 3:
        print(f"negatives of a row: {negatives.min()} to {negatives.max()}, {negatives.mean():.1f} in the mean")
    if repeated := len(rows.texts) - len(np.unique(rows.identities[:, 0])):
        print(f"{repeated} rows repeat another row's anchor: never in one batch with it")

    judged = {name: split for name in ("validation", "test") if (split := getattr(splits, name))}
    print("\n".join(tables({name: {"data": split.data} | split.summary for name, split in judged.items()})[:-1]))
    print(f"validation chooses the step, by {splits.validation.metric}")
    if cut_dev:
        print(f"{cut_dev} of its {len(dev_tokens)} texts are cut to {config.max_length} tokens")
    if not splits.test:
        print("no sts-test.csv: no test figure will be reported")
    elif repeated := repeated_in_test(splits):
        print(f"{repeated} of the {len(splits.test.rows)} test pairs are also in sts-dev.csv")
    if few := few_rows(len(splits.validation.rows)):
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


def evaluation_line(step: int, metric: str, scores: dict, seconds: float, note: str = "") -> str:
    """What is printed after an evaluation in training: the metric that chooses, then the others."""
    others = [name for name, value in scores.items() if isinstance(value, float) and name != metric]
    figures = [f"{name} {scores[name]:.4f}" for name in (metric, *others)]
    parts = [f"step {step}", f"validation {figures[0]}", *figures[1:], f"{seconds:.1f} s", note]
    return " | ".join(filter(None, parts))


def few_judged(results: dict) -> str | None:
    """few_rows of results.json."""
    return few_rows(results["validation"].get("pairs") or results["validation"]["queries"])


def last_line(results: dict, path: str) -> str:
    """What a finished run prints last, and again when it is started once more."""
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} (step {results['step']})"]
    parts += [few] if (few := few_judged(results)) else []
    parts.append(f"{results['base']:.4f} without adapter")
    parts += [f"test spearman {results['test']['spearman']:.4f}"] if results["test"] else []
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {path}"])


def report(
    scores: dict[str, dict | None], splits: Splits, errors: list[dict], evaluations: list[dict], config: Config
) -> str:
    """report.md. scores: of each split; errors: of the last of them; evaluations: those of metrics.jsonl."""
    dev = splits.validation
    lines = [f"# {config.model} on {config.data_dir}", ""]
    lines += [f"The step was chosen by {dev.metric} on validation, {dev.data}: its row flatters."]
    lines += ["Correlations are of the cosine with people's scores; figures of a search are means over its queries."]
    lines += [f"**{few.capitalize()}.**"] if (few := few_rows(len(dev.rows))) else []
    lines += [f"These are of the model in best/ as it is saved, adapter merged, computed with amp {config.amp}."]
    if splits.test:
        repeated = f"{repeated_in_test(splits)} of its {len(splits.test.rows)} pairs"
        lines += [f"Nothing was chosen on test; {repeated} are also in sts-dev.csv.", ""]
    else:
        lines += ["There is no test split: no test figure.", ""]
    lines += tables({name: values for name, values in scores.items() if values})
    columns = ["step", "epoch", *(name for name, value in scores["validation"].items() if isinstance(value, float))]
    lines += ["## Steps (validation, before merging, as the step was chosen; 0: without adapter)", ""]
    lines += table(columns, [[record[column] for column in columns] for record in evaluations])
    return "\n".join(lines + errors_table("test" if splits.test else "validation", errors))
