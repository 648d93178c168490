"""Train and test on every fold: mean and spread over the test splits. Goes on where it was, like train.py.

    python redsm5_nli/cross_validate.py --sample --quick          # 2 folds, 3 epochs
    python redsm5_nli/cross_validate.py --folds 5

Each fold is an ordinary run in fold<i> of the run folder; cross_validation.json and .md stand beside them. Every post
is in one test split, and nothing is chosen there: pooled, the folds' answers are those to all posts.
"""

import csv
import statistics
import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from common.checkpoint import UserError
from common.checkpoint.files import read_json, write_json, write_text
from redsm5_nli.cli import displayed, run_path, run_script
from redsm5_nli.config import Config
from redsm5_nli.report import COLUMNS, RULES, cautions, table
from redsm5_nli.train import main as train

DEFAULT_FOLDS, QUICK_FOLDS, QUICK_EPOCHS = 5, 2, 3


def test_scores(test: dict) -> dict[str, float]:
    """The scores of one fold's run, from the results of its test split."""
    scores = {f"{name}, {rule}": test[key][name] for key, rule in RULES.items() for name in COLUMNS}
    return scores | {"auprc": test["auprc"], "auc": test["auc"]}


def pooled_scores(folds: list[Path], results: list[dict]) -> dict[str, dict]:
    """Counts and scores of each criterion, and of all pairs, over the test posts of all folds.

    Each fold answers yes from its one threshold on, as predict.py does.
    """
    from common.metrics import binary_scores

    labels, answers = defaultdict(list), defaultdict(list)
    for fold, result in zip(folds, results):
        with open(fold / "predictions/test_predictions.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                labels[row["criterion"]].append(int(row["label"]))
                answers[row["criterion"]].append(int(float(row["probability"]) >= result["thresholds"]["global"]))
    for pairs in (labels, answers):
        pairs["all pairs"] = list(chain(*pairs.values()))
    pooled = {}
    for name, right in labels.items():
        counts = {"positives": sum(right), "predicted": sum(answers[name])}
        scores = binary_scores(np.array(right), np.array(answers[name]))
        pooled[name] = counts | dict(zip(("precision", "recall", "f1"), scores))
    return pooled


def main(config: Config, quick: bool) -> int | None:
    if config.fold:
        raise UserError("--fold chooses one fold: python redsm5_nli/train.py takes it, here all are run")
    changes = {"folds": config.folds or (QUICK_FOLDS if quick else DEFAULT_FOLDS)}
    config = config.model_copy(update=changes | ({"epochs": QUICK_EPOCHS} if quick else {}))
    path = run_path(config)
    path = path if config.run_dir else path.with_name(f"{path.name}-folds")  # path itself may be an ordinary run
    folds = [path / f"fold{number}" for number in range(config.folds)]
    for number, fold in enumerate(folds):
        print(f"fold {number} of {config.folds}")
        if code := train(config.model_copy(update={"fold": number, "run_dir": str(fold)})):
            return code

    # The scores of all folds
    results = [read_json(fold / "results.json") for fold in folds]
    scores, rows = [test_scores(result["test"]) for result in results], []
    for name in scores[0]:
        values = [fold[name] for fold in scores]
        rows.append([name, statistics.mean(values), statistics.stdev(values), min(values), max(values)])
    lines = table(["test score", "mean", "standard deviation", "min", "max"], rows)
    pooled = pooled_scores(folds, results)
    header = ["pooled over the folds, one threshold", *pooled["all pairs"]]
    lines += table(header, [[name, *row.values()] for name, row in pooled.items()])
    said = [f"fold {number}: {caution}" for number, result in enumerate(results) for caution in cautions(result)]
    write_json(path / "cross_validation.json", {"folds": scores, "pooled": pooled})
    write_text(path / "cross_validation.md", "\n".join([f"# {config.folds} folds", "", *lines, *said]))
    print("\n".join(lines))
    macro, positive = (f"{row[1]:.4f} ± {row[2]:.4f}" for row in rows[1:3])  # at .5
    done = f"done | {config.folds} folds | test f1_macro {macro} | f1_positive {positive}"
    print(" | ".join([done, *said, f"results in {displayed(path)}"]))
    return None


if __name__ == "__main__":
    flag = {"action": "store_true", "help": f"{QUICK_EPOCHS} epochs, {QUICK_FOLDS} folds unless --folds is given"}
    sys.exit(run_script(main, __doc__, quick=flag))
