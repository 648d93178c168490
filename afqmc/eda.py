"""Look at the data before training: sizes, labels, lengths, duplicates, contradictions, shared sentences.

    python afqmc/eda.py --data_dir ../clue/afqmc      # a folder of train.json and, where there, dev.json, test.json
    python afqmc/eda.py --sample
"""

import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from afqmc.cli import run_script
from afqmc.config import Config
from afqmc.dataset import Pair, Split, count_unread, find_data, label_names, make_split, read_pairs
from afqmc.loss import class_weights
from afqmc.model import find_tokenizer
from afqmc.report import label_shares, table, unread_line
from common.checkpoint import ROOT
from common.checkpoint.rows import data_file


def histogram(lengths: np.ndarray, bins: int = 12, width: int = 50) -> list[str]:
    """Text bars of equal-width bins; the last bin holds everything from the 99.5th percentile on."""
    step = max(1, int(np.ceil(np.percentile(lengths, 99.5) / bins)))
    counts = np.bincount(np.minimum(lengths // step, bins), minlength=bins + 1)
    names = [f"{i * step:>4}-{(i + 1) * step - 1:<4}" for i in range(bins)] + [f"{bins * step:>4}+    "]
    return [f"{name} {'#' * round(width * n / counts.max()):<{width}} {n}" for name, n in zip(names, counts)] + [""]


def recommended_max_length(lengths: np.ndarray) -> int:
    """The 99th percentile of the tokens, rounded up to a multiple of 8: cuts at most one pair in a hundred."""
    return int(np.ceil(np.percentile(lengths, 99, method="inverted_cdf") / 8) * 8)


def repetitions(pairs: list[Pair], names: tuple[str, ...]) -> dict[str, int]:
    """Rows that repeat an earlier pair as it is, swapped or in another writing, and pairs that have several labels.

    What is the same but for writing (case, width, punctuation) and order is one pair.
    """
    as_is, unordered = {pair[:2] for pair in pairs}, {frozenset(pair[:2]) for pair in pairs}
    by_key = defaultdict(set)
    for pair in pairs:
        by_key[pair.key].add(pair.label)
    equal = Counter(pair.label for pair in pairs if pair.key[0] == pair.key[1])
    return {
        "repeated as they are": len(pairs) - len(as_is),
        "repeated swapped": len(as_is) - len(unordered),
        "repeated in another writing": len(unordered) - len(by_key),
        "pairs with several labels": sum(len(labels) > 1 for labels in by_key.values()),
        "equal sentences": equal.total(),
    } | {f"equal sentences with label {name}": equal[name] for name in names}


def overlap_rows(files: dict[str, list[Pair]]) -> list[list]:
    """For each two files: pairs (either order) and distinct sentences that stand in both, in any writing."""
    sentences = {name: {text for pair in pairs for text in pair.key} for name, pairs in files.items()}
    keys = {name: {pair.key for pair in pairs} for name, pairs in files.items()}
    rows = []
    for first, second in combinations(files, 2):
        shared = len(sentences[first] & sentences[second])
        share = f"{shared} ({shared / len(sentences[second]):.1%} of {second})"
        rows.append([f"{first}, {second}", len(keys[first] & keys[second]), share])
    return rows


def length_rows(files: dict[str, Split]) -> list[list]:
    rows = []
    for name, (pairs, lengths, *_) in files.items():
        characters = np.array([len(sentence) for pair in pairs for sentence in pair[:2]])
        for what, values in (("characters in a sentence", characters), ("tokens in a pair", lengths)):
            rows.append([name, what, *np.percentile(values, (50, 95, 99, 100)).astype(int).tolist()])
    return rows


def main(config: Config) -> None:
    # train.json, which must be there, and dev.json and test.json where they are; test.json has no labels
    paths, tokenizer = find_data(config), find_tokenizer(config)
    pairs = {"train": read_pairs(paths["train"])}
    labels = label_names(pairs["train"])
    if "dev" in paths:
        pairs["dev"] = read_pairs(paths["dev"], names=labels)
    if path := data_file(ROOT / config.data_dir, "test"):
        pairs["test"] = read_pairs(path, labelled=False)
    files = {name: make_split(some, tokenizer, labels) for name, some in pairs.items()}
    train = files["train"]

    print(f"{config.data_dir}, tokens of {config.model}\n")
    rows = [[name, len(split.pairs), *label_shares(split)] for name, split in files.items()]
    print("\n".join(table(["file", "rows", *(f"label {name}" for name in labels)], rows)))
    if len(labels) > 1:
        weights = class_weights("balanced", train).tolist()
        print(f"balanced class weights of train: {', '.join(f'{weight:.4f}' for weight in weights)}\n")
    else:
        print("train has one label only: no class weights, and nothing to learn\n")

    print("\n".join(table(["file", "length of", "p50", "p95", "p99", "max"], length_rows(files))))
    print("tokens in a pair (train)")
    print("\n".join(histogram(train.lengths)))
    print(f"recommended max_length: {recommended_max_length(train.lengths)} (99 % of the training pairs fit)")
    longer = int((train.lengths > config.max_length).sum())
    print(f"max_length {config.max_length} cuts {longer} of {len(train.pairs)} training pairs\n")

    if unread := sum((count_unread(split.pairs) for split in files.values()), Counter()):
        print(f"{unread_line(unread)}\n")
    counts = {name: repetitions(some, labels) for name, some in pairs.items()}
    rows = [[what, *(counts[name][what] for name in files)] for what in counts["train"]]
    print("\n".join(table(["rows", *files], rows)))
    if len(files) > 1:
        rows = overlap_rows(pairs)
        print("\n".join(table(["files", "pairs in both", "sentences in both"], rows)))


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
