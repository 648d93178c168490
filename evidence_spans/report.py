"""Tables for people: what is trained on, and how good the result is, in Markdown."""

import numpy as np

from evidence_spans.config import Config
from evidence_spans.formats import Example, Source
from evidence_spans.windows import Window, answer_tokens


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined."""
    cells = [header, ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def print_summary(
    splits: dict[str, list[Example]], windows: dict[str, list[Window]], source: Source, config: Config
) -> None:
    """The tables of what is trained on: posts, examples of each kind, windows, lengths in tokens, what is left out."""
    rows, lengths = [], []
    for name, examples in splits.items():
        kinds = [sum(example.kind == kind for example in examples) for kind in ("answered", "rejected", "unannotated")]
        whole = len({window.example for window in windows[name] if window.labels})
        posts = len({example.post for example in examples})
        rows.append([name, posts, len(examples), *kinds, len(windows[name]), kinds[0] - whole])
        for what, values in (
            ("window", [len(window.input_ids) for window in windows[name]]),
            ("answer", answer_tokens(windows[name])),
        ):
            found = np.percentile(values, (50, 95, 100)).astype(int).tolist() if len(values) else [0, 0, 0]
            lengths.append([f"{name}, {what}", *found])
    header = ["split", "posts", "examples", "answered", "rejected", "unannotated", "windows"]
    print("\n".join(table([*header, "answer in no window whole"], rows)[:-1]))
    print("\n".join(table(["tokens", "p50", "p95", "max"], lengths)[:-1]))
    found = ", ".join(f"{n} {what}" for what, n in sorted(source.counts.items()) if n)
    print(f"read: {found}; a bad row would end the run")
    if source.not_found:
        file, lines = source.not_found[0]["file"], [str(row["line"]) for row in source.not_found]
        more = f" and {len(lines) - 20} more" * (len(lines) > 20)
        print(f"not found in their posts: {file}, lines {', '.join(lines[:20])}{more} (not_found.jsonl in the run)")


def score_table(scores: dict, names: list[str]) -> list[str]:
    """One row for each split and rule."""
    threshold = scores["decoding"]["threshold"]
    rules = {"at_threshold": "never" if threshold is None else f"{threshold:.4f}, tuned on validation"}
    if threshold is not None:
        rules |= {"at_zero": "0"}
    rules |= {"all_empty": "always (for comparison)"}
    rows = []
    for name in names:
        for key, rule in rules.items():
            found = scores[name][key]
            kinds = [found[kind][column] for kind in ("has_answer", "no_answer") for column in ("f1", "exact_match")]
            tokens = found.get("tokens", {}).get("f1")
            rows.append([name, rule, found["rows"], found["f1"], found["exact_match"], *kinds[:3], tokens])
    header = ["split", "empty where null - best above", "examples", "f1", "exact match"]
    return table([*header, "f1 with answer", "exact match with answer", "f1 without answer", "token f1"], rows)


def report(scores: dict, history: list[dict], config: Config) -> str:
    """The readable evaluation, in Markdown."""
    names, decoding = [name for name in ("validation", "test") if name in scores], scores["decoding"]
    lines = [f"# {config.model} on {config.data_dir}", ""]
    lines += ["Epoch, thresholds and calibration were chosen on validation, so its own rows flatter; test is only"]
    lines += [f"reported. Answers have at most {decoding['max_answer_length']} tokens.", ""]
    lines += score_table(scores, names)
    rows = []
    for name in names:
        for key, what in (("all", "all examples"), ("posts_with_several", "those with several spans")):
            if found := scores[name].get("several", {}).get(key):
                rows.append([name, what, *(found[column] for column in ("precision", "recall", "f1"))])
    if rows:
        lines += [f"Several spans of one example, differences of at most {decoding['span_threshold']:.4f}:", ""]
        lines += table(["split", "whole spans of", "precision", "recall", "f1"], rows)
    rows = [[name, scores[name]["loss"], scores[name].get("no_answer_brier")] for name in names]
    lines += table(["split", "loss", "Brier score of no answer"], rows)
    columns = ["epoch", "step", "train_loss", "loss", "f1", "exact_match", "f1_balanced"]
    lines += ["## Evaluations (validation, tuned threshold)", ""]
    lines += table(columns, [[record[column] for column in columns] for record in history])
    return "\n".join(lines)
