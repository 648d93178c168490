"""Runs side by side: in what their configs differ, and what they scored. Reads their folders, writes nothing.

    python redsm5_nli/results.py                                   # all of redsm5_nli/runs
    python redsm5_nli/results.py --runs runs/a runs/b --sort f1_positive
"""

import sys
from itertools import product
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from common.checkpoint.run import read_run
from redsm5_nli.cli import PROJECT, displayed, run_script
from redsm5_nli.config import Config
from redsm5_nli.report import cautions, table

SCORES = ("f1_macro", "f1_positive", "auprc")


def read_row(path: Path) -> tuple[dict, dict]:
    """Settings of a run, and its scores at .5 with what is to be said of them: dashes where it is not finished.

    Raises UserError.
    """
    settings, scores = read_run(path)["config"], {}
    finished = (path / "results.json").exists()
    results = read_json(path / "results.json") if finished else {}
    try:
        for split, name in product(("validation", "test"), SCORES):
            scores[f"{split} {name}"] = (results[split]["at_half"] | results[split])[name] if finished else None
        scores["epoch"] = results["epoch"] if finished else "unfinished"
        return settings, scores | {"caution": "; ".join(cautions(results)) or None if finished else None}
    except KeyError as error:
        raise UserError(f"{path / 'results.json'} has no {error}: not a run of this project") from error


def main(config: Config, runs: list[str], sort: str) -> None:
    folders = [Path(run) for run in runs]
    folders = folders or sorted(path.parent for path in (PROJECT / "runs").glob("**/config.json"))  # folds too
    if not folders:
        raise UserError("redsm5_nli/runs holds no run: train first, or name run folders with --runs")
    rows = [(displayed(path.resolve()), *read_row(path)) for path in folders]
    column = f"validation {sort}"
    rows.sort(key=lambda row: row[2][column] or -1.0, reverse=True)
    fields = dict.fromkeys(name for _, settings, _ in rows for name in settings)
    differing = [name for name in fields if len({str(settings.get(name)) for _, settings, _ in rows}) > 1]
    cells = [[run, *(str(settings.get(n, "-")) for n in differing), *scores.values()] for run, settings, scores in rows]
    print("\n".join(table(["run", *differing, *rows[0][2]], cells)[:-1]))
    print(f"sorted by {column}; all scores at the threshold .5")


if __name__ == "__main__":
    flags = {
        "runs": {"nargs": "+", "default": [], "help": "run folders; none: all of redsm5_nli/runs"},
        "sort": {"choices": SCORES, "default": "f1_macro", "help": "the validation score to sort by"},
    }
    sys.exit(run_script(main, __doc__, **flags))
