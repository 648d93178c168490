"""Train and test on every fold: mean and spread over the test splits. Goes on where it was, like train.py.

    python redsm5_nli/cross_validate.py --sample --quick          # 2 folds, 3 epochs
    python redsm5_nli/cross_validate.py --folds 5

Each fold is an ordinary run in fold<i> of the run folder; cross_validation.json and .md stand beside them. Every post
is in one test split, and nothing is chosen there.
"""

import statistics
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import read_json, write_json, write_text
from redsm5_nli.config import Config, UserError, run_path, run_script, shown
from redsm5_nli.report import COLUMNS, RULES, table
from redsm5_nli.train import main as train

DEFAULT_FOLDS, QUICK_FOLDS, QUICK_EPOCHS = 5, 2, 3


def fold_scores(results: dict) -> dict[str, float]:
    """The test scores of one fold."""
    test = results["test"]
    scores = {f"{name}, {rule}": test[key][name] for key, rule in RULES.items() for name in COLUMNS}
    return scores | {"auprc": test["auprc"], "auc": test["auc"]}


def summary(folds: list[dict[str, float]]) -> list[str]:
    """A table: each score's mean, sample standard deviation, minimum and maximum over the folds."""
    rows = []
    for name in folds[0]:
        values = [fold[name] for fold in folds]
        rows.append([name, statistics.mean(values), statistics.stdev(values), min(values), max(values)])
    return table(["test score", "mean", "standard deviation", "min", "max"], rows)


def main(config: Config, quick: bool) -> int | None:
    if config.fold:
        raise UserError("--fold chooses one fold: python redsm5_nli/train.py takes it, here all are run")
    config = replace(config, folds=config.folds or (QUICK_FOLDS if quick else DEFAULT_FOLDS))
    if quick:
        config = replace(config, epochs=QUICK_EPOCHS)
    path = run_path(config)
    path = path if config.run_dir else path.with_name(f"{path.name}-folds")  # path itself may be an ordinary run
    for fold in range(config.folds):
        print(f"fold {fold} of {config.folds}")
        if code := train(replace(config, fold=fold, run_dir=str(path / f"fold{fold}"))):
            return code
    folds = [fold_scores(read_json(path / f"fold{fold}" / "results.json")) for fold in range(config.folds)]
    lines = summary(folds)
    write_json(path / "cross_validation.json", {"folds": folds})
    write_text(path / "cross_validation.md", "\n".join([f"# {config.folds} folds", "", *lines]))
    print("\n".join(lines))
    macro, positive = ([fold[f"{name}, .5"] for fold in folds] for name in ("f1_macro", "f1_positive"))
    print(
        f"done | {config.folds} folds | test f1_macro {statistics.mean(macro):.4f} ± {statistics.stdev(macro):.4f} | "
        f"f1_positive {statistics.mean(positive):.4f} ± {statistics.stdev(positive):.4f} | results in {shown(path)}"
    )
    return None


if __name__ == "__main__":
    flag = {"action": "store_true", "help": f"{QUICK_EPOCHS} epochs, {QUICK_FOLDS} folds unless --folds is given"}
    sys.exit(run_script(main, __doc__, quick=flag))
