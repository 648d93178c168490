"""Tables for people, in Markdown: what is trained on, and how good the result is."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from evidence_spans.config import Config
from evidence_spans.dataset import Split, draw_windows
from evidence_spans.formats import KINDS, Source


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined; a text stays in its cell."""
    cells = [[*map(cell, header)], ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else cell(str(c)) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def cell(text: str) -> str:
    """On one line, and nothing in it that ends a cell or that Markdown takes for HTML, a link or an image."""
    return " ".join(text.split()).translate({ord(mark): f"&#{ord(mark)};" for mark in "|<&["})


def print_summary(splits: dict[str, Split], source: Source, cautions: list[str], config: Config) -> None:
    """The tables of what is trained on: posts, examples of each kind, windows, lengths in tokens, what is left out.

    Raises UnfitSettings as draw_windows does.
    """
    rows, lengths = [], []
    counts = {name: Counter(example.kind for example in split.examples) for name, split in splits.items()}
    kinds = [kind for kind in KINDS if any(some[kind] for some in counts.values())]
    for name, split in splits.items():
        labelled = [owner for owner, labels in zip(split.owners.tolist(), split.windows.labels) if labels]
        posts, cut = len({example.post for example in split.examples}), counts[name]["answered"] - len({*labelled})
        examples = len(split.examples), *(counts[name][kind] for kind in kinds)
        rows.append([name, posts, *examples, len(split.windows), len(labelled), cut])
        answers = [end - start + 1 for labels in split.windows.labels for start, end in labels]
        for what, values in (("window", split.lengths), ("answer", answers)):
            percentiles = np.percentile(values, (50, 95, 100)).astype(int).tolist() if len(values) else [0, 0, 0]
            lengths.append([f"{name}, {what}", *percentiles])
    header = ["split", "posts", "examples", *kinds, "windows", "with an answer", "answer in no window whole"]
    print("\n".join(table(header, rows)[:-1]))
    print("\n".join(table(["tokens", "p50", "p95", "max"], lengths)[:-1]))

    print(drawn_line(splits["train"], config))
    read = ", ".join(f"{n} {what}" for what, n in sorted(source.counts.items()) if n)
    print(f"read: {read}; a bad row would end the run")
    if source.unread:
        print(unread_line(source.unread))
    for caution in cautions:
        print(caution)
    if source.not_found:
        file, lines = source.not_found[0]["file"], [str(row["line"]) for row in source.not_found]
        more = f" and {len(lines) - 20} more" * (len(lines) > 20)
        print(f"not found in their posts: {file}, lines {', '.join(lines[:20])}{more} (not_found.jsonl in the run)")


def drawn_line(train: Split, config: Config) -> str:
    """How many windows an epoch takes, and what helps where it takes all and most of them hold no answer."""
    drawn, all_windows = len(draw_windows(train, config, 0)), len(train.windows)
    answered = sum(map(bool, train.windows.labels))
    line = f"an epoch takes {drawn} of {all_windows} windows of train, {answered} of them with an answer"
    if drawn < all_windows or drawn <= 2 * answered:
        return line
    return f"{line}: most hold none, which trains to no answer; --negatives_per_positive 1 draws one for each with one"


def unread_line(unread: Counter) -> str:
    line = "keys that nobody reads: " + ", ".join(f"{key} ({count} rows)" for key, count in unread.most_common())
    return line.encode(errors="replace").decode()  # JSON can hold half a surrogate pair


def evaluation_line(scores: dict, better: bool) -> str:
    """What is printed after an evaluation in training."""
    return (
        f"epoch {scores['epoch']:g} | train loss {scores['train_loss']:.4f} | validation loss {scores['loss']:.4f} | "
        f"f1 {scores['f1']:.4f} | exact match {scores['exact_match']:.4f} | "
        f"f1 with answer {scores['f1_has_answer']:.4f}{' | best' * better}"
    )


def last_line(results: dict, path: str) -> str:
    """What a finished run prints last, and again when it is started once more."""
    parts = [f"done | {results['split']} {results['metric']} {results['best']:.4f} (epoch {results['epoch']:g})"]
    for split in ("validation", "test"):
        scores = results[split]["at_threshold"]
        line = f"{split} f1 {scores['f1']:.4f}, exact match {scores['exact_match']:.4f}"
        if scores["no_answer"]["rows"]:
            line += f", f1 of those with an answer {scores['has_answer']['f1']:.4f}"
        parts.append(line)
    parts[1:1] = results.get("cautions", [])
    return " | ".join([*parts, f"{results['seconds']:.0f} s", f"results in {path}"])


def find_low_scores(scores: dict, config: Config) -> list[str]:
    """What to say where hardly an answer is found, and why that can be."""
    found = {name: score["at_threshold"]["has_answer"] for name, score in scores.items() if name != "decoding"}
    low = [name for name, score in found.items() if score["rows"] and score["f1"] < 0.1]
    why = ["trained too little (steps, learning_rate)"]
    if config.negatives_per_positive <= 0:
        why.append("on windows of which most hold no answer (--negatives_per_positive 1 draws fewer)")
    if config.metric != "f1_balanced":
        why.append("with a threshold for rows of which most have none (--metric f1_balanced)")
    return [f"f1 of those with an answer is near 0 on {' and '.join(low)}: {', or '.join(why)}"] if low else []


def score_table(scores: dict, names: Sequence[str]) -> list[str]:
    """One row for each split and rule."""
    threshold = scores["decoding"]["threshold"]
    rules = {"at_threshold": "never" if threshold is None else f"{threshold:.4f}, tuned on validation"}
    if threshold is not None:
        rules |= {"at_zero": "0"}
    rules |= {"all_empty": "always (for comparison)"}
    rows = []
    for name in names:
        for key, rule in rules.items():
            row = scores[name][key]
            kinds = [row["has_answer"]["f1"], row["has_answer"]["exact_match"], row["no_answer"]["f1"]]
            tokens = row.get("tokens", {}).get("f1")
            rows.append([name, rule, row["rows"], row["f1"], row["exact_match"], *kinds, tokens])
    header = ["split", "empty where null - best above", "examples", "f1", "exact match"]
    return table([*header, "f1 with answer", "exact match with answer", "f1 without answer", "token f1"], rows)


def score_lines(scores: dict, names: Sequence[str]) -> list[str]:
    """The scores of these splits, what to say beside them, and what is counted."""
    lines = score_table(scores, names)
    lines += [f"- {caution}" for caution in scores["cautions"]] + [""] * bool(scores["cautions"])
    scripts = "Han, kana, Thai, Lao, Khmer and Burmese script"
    return [*lines, f"F1 counts words, which stand between blanks; of {scripts} each character is one.", ""]


def report(scores: dict, history: list[dict], config: Config) -> list[str]:
    """The readable evaluation, in lines of Markdown."""
    names, decoding = [name for name in ("validation", "test") if name in scores], scores["decoding"]
    lines = [f"# {config.model} on {config.data_dir}", ""]
    chosen = "Epoch, thresholds and calibration were chosen on validation, so its own rows flatter; test is only"
    lines += [f"{chosen} reported. Answers have at most {decoding['max_answer_length']} tokens.", ""]
    lines += score_lines(scores, names)
    rows = []
    for name in names:
        for key, what in (("all", "all examples"), ("posts_with_several", "those with several spans")):
            if several := scores[name].get("several", {}).get(key):
                rows.append([name, what, *(several[column] for column in ("precision", "recall", "f1"))])
    if rows:
        lines += [f"Several spans of one example, differences of at most {decoding['span_threshold']:.4f}:", ""]
        lines += table(["split", "whole spans of", "precision", "recall", "f1"], rows)
    rows = [[name, scores[name]["loss"], scores[name].get("no_answer_brier")] for name in names]
    lines += table(["split", "loss", "Brier score of no answer"], rows)
    columns = ["epoch", "step", "train_loss", "loss", "f1", "exact_match", "f1_balanced"]
    lines += ["## Evaluations (validation, tuned threshold)", ""]
    return lines + table(columns, [[record[column] for column in columns] for record in history])
