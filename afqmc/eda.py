"""Look at the data before training: sizes, labels, lengths, duplicates, contradictions, shared sentences.

    python afqmc/eda.py --data_dir ../clue/afqmc      # a folder of train.json and, where there, dev.json, test.json
    python afqmc/eda.py --sample
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from transformers import PreTrainedTokenizerFast

from afqmc.config import ROOT, Config, run_script
from afqmc.dataset import LABELS, Pair, read_pairs, repeated_in_test, token_lengths
from afqmc.model import class_weights, load_tokenizer

PERCENTILES = (50, 95, 99, 100)


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined."""
    cells = [header, ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def print_summary(splits: dict[str, list[Pair]], tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """The table of what is trained on: rows, label shares, lengths in tokens."""
    rows = []
    for name, pairs in splits.items():
        lengths = token_lengths(pairs, tokenizer)
        percentiles = np.percentile(lengths, (50, 95, 99, 100)).astype(int).tolist()
        share = sum(pair.label for pair in pairs) / len(pairs)
        rows.append([name, len(pairs), f"{share:.1%}", *percentiles, int((lengths > config.max_length).sum())])
    header = ["split", "rows", "label 1", "tokens p50", "p95", "p99", "max", f"cut to {config.max_length}"]
    print("\n".join(table(header, rows)[:-1]))
    print("rows dropped: 0 (blank lines are skipped, a bad row ends the run)")
    if "test" in splits and (seen := repeated_in_test(splits)):
        print(f"{seen} of the {len(splits['test'])} test pairs are also in train.json")


def histogram(lengths: np.ndarray, bins: int = 12, width: int = 50) -> list[str]:
    """Text bars of equal-width bins; the last bin holds everything from the 99.5th percentile on."""
    step = max(1, int(np.ceil(np.percentile(lengths, 99.5) / bins)))
    counts = np.bincount(np.minimum(lengths // step, bins), minlength=bins + 1)
    names = [f"{i * step:>4}-{(i + 1) * step - 1:<4}" for i in range(bins)] + [f"{bins * step:>4}+    "]
    return [f"{name} {'#' * round(width * n / counts.max()):<{width}} {n}" for name, n in zip(names, counts)] + [""]


def length_rows(name: str, pairs: list[Pair], tokens: np.ndarray) -> list[list]:
    characters = np.array([len(sentence) for pair in pairs for sentence in pair[:2]])
    return [
        [name, unit, *np.percentile(lengths, PERCENTILES).astype(int).tolist()]
        for unit, lengths in (("characters in a sentence", characters), ("tokens in a pair", tokens))
    ]


def recommended_max_length(tokens: np.ndarray) -> int:
    """The 99th percentile of the tokens, rounded up to a multiple of 8: cuts at most one pair in a hundred."""
    return int(np.ceil(np.percentile(tokens, 99, method="inverted_cdf") / 8) * 8)


def repetitions(pairs: list[Pair]) -> dict[str, int]:
    """Rows that repeat an earlier pair as it is, or swapped, and unordered pairs that have both labels."""
    as_is, by_key = Counter(pair[:2] for pair in pairs), defaultdict(set)
    for pair in pairs:
        by_key[pair.key].add(pair.label)
    repeated = len(pairs) - len(as_is)
    return {
        "repeated as they are": repeated,
        "repeated swapped": len(pairs) - len(by_key) - repeated,
        "pairs with both labels": sum({0, 1} <= labels for labels in by_key.values()),
        "equal sentences": sum(len(pair.key) == 1 for pair in pairs),
        "equal sentences with label 0": sum(len(pair.key) == 1 and pair.label == 0 for pair in pairs),
    }


def read_files(config: Config) -> dict[str, list[Pair]]:
    """train.json, which must be there, and dev.json and test.json where they are; test.json has no labels."""
    folder = ROOT / config.data_dir
    files = {"train": read_pairs(folder / "train.json")}
    for name, labelled in (("dev", True), ("test", False)):
        if (folder / f"{name}.json").exists():
            files[name] = read_pairs(folder / f"{name}.json", labelled)
    return files


def overlap_rows(files: dict[str, list[Pair]]) -> list[list]:
    """For each two files: pairs (either order) and distinct sentences that stand in both."""
    names, rows = list(files), []
    sentences = {name: {sentence for pair in files[name] for sentence in pair[:2]} for name in names}
    keys = {name: {pair.key for pair in files[name]} for name in names}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = sentences[first] & sentences[second]
            share = f"{len(shared)} ({len(shared) / len(sentences[second]):.1%} of {second})"
            rows.append([f"{first}, {second}", len(keys[first] & keys[second]), share])
    return rows


def print_lengths(files: dict[str, list[Pair]], tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    tokens = {name: token_lengths(pairs, tokenizer) for name, pairs in files.items()}
    rows = [row for name, pairs in files.items() for row in length_rows(name, pairs, tokens[name])]
    print("\n".join(table(["file", "length of", "p50", "p95", "p99", "max"], rows)))
    print("tokens in a pair (train)")
    print("\n".join(histogram(tokens["train"])))
    longer = int((tokens["train"] > config.max_length).sum())
    print(f"recommended max_length: {recommended_max_length(tokens['train'])} (99 % of the training pairs fit)")
    print(f"max_length {config.max_length} cuts {longer} of {len(files['train'])} training pairs\n")


def main(config: Config) -> None:
    tokenizer = load_tokenizer(config)
    files = read_files(config)
    print(f"{config.data_dir}, tokens of {config.model}\n")
    labelled = [name for name in files if name != "test"]
    rows = []
    for name in labelled:
        counts = Counter(pair.label for pair in files[name])
        rows.append([name, len(files[name]), *(f"{counts[i]} ({counts[i] / len(files[name]):.1%})" for i in (0, 1))])
    rows += [["test", len(files["test"]), "-", "-"]] if "test" in files else []
    print("\n".join(table(["file", "rows", *(f"label {name}" for name in LABELS)], rows)))
    labels = [pair.label for pair in files["train"]]
    if len(set(labels)) == len(LABELS):
        weights = class_weights("balanced", labels)
        print(f"balanced class weights of train: {', '.join(f'{weight:.4f}' for weight in weights.tolist())}\n")
    else:
        print("train has one label only: no class weights, and nothing to learn\n")
    print_lengths(files, tokenizer, config)
    counts = {name: repetitions(files[name]) for name in files}
    header = ["rows", *files]
    print("\n".join(table(header, [[what, *(counts[name][what] for name in files)] for what in counts["train"]])))
    if len(files) > 1:
        print("\n".join(table(["files", "pairs in both", "sentences in both"], overlap_rows(files))))


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
