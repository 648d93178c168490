"""Runs side by side, the newest first: settings that differ, scores, when, how long, the command. Writes nothing.

    python emotions/results.py                                   # all of emotions/runs
    python emotions/results.py --runs runs/a runs/b --sort f1_macro
"""

import sys
from datetime import timedelta
from functools import reduce
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from common.checkpoint.run import read_run
from emotions.cli import PROJECT, displayed, run_script
from emotions.config import Config
from emotions.report import table

# Name -> place in results.json; at a threshold per label, cross-fitted on validation
SCORES = {"validation f1_macro": "validation.cross_fitted.at_per_label.f1_macro", "validation map": "validation.map"}
SCORES |= {"test f1_macro": "test.at_per_label.f1_macro", "test map": "test.map"}


def read_row(path: Path) -> tuple[dict, dict]:
    """A run's settings, and the other cells of its row: None where there is none (yet). Raises UserError."""
    run, cells = read_run(path), {}
    results = read_json(path / "results.json") if (path / "results.json").exists() else {}
    if results and "cross_fitted" not in results["validation"]:
        raise UserError(f"{path / 'results.json'} has no cross_fitted: not a run of this project")
    for name, place in SCORES.items():
        cells[name] = reduce(lambda found, key: (found or {}).get(key), place.split("."), results)
    cells["caution"] = results["validation"].get("too_few") if results else "unfinished"
    cells["started"] = run["started"][:19].replace("T", " ") if "started" in run else None
    cells["time"] = timedelta(seconds=round(results["seconds"])) if results else None
    return run["config"], cells | {"epoch": results.get("epoch"), "command": run.get("command")}


def main(config: Config, runs: list[str], sort: str | None) -> None:
    paths = [Path(run).resolve() for run in runs]
    paths = paths or sorted(path.parent for path in (PROJECT / "runs").glob("*/config.json"))
    if not paths:
        raise UserError(f"{PROJECT / 'runs'} holds no run: train first, or name run folders with --runs")
    rows, column = [(displayed(path), *read_row(path)) for path in paths], f"validation {sort}" if sort else "started"
    rows.sort(key=lambda row: (row[2][column] is not None, row[2][column]), reverse=True)
    names = dict.fromkeys(name for _, settings, _ in rows for name in settings)
    differing = [name for name in names if len({str(settings.get(name)) for _, settings, _ in rows}) > 1]
    lines = [[run, *(str(settings.get(n, "-")) for n in differing), *cells.values()] for run, settings, cells in rows]
    print("\n".join(table(["run", *differing, *rows[0][2]], lines)[:-1]))
    print(f"sorted by {column}; {', '.join(SCORES.values())} of results.json")


if __name__ == "__main__":
    own = {"runs": {"nargs": "+", "default": [], "help": "run folders; none: all of emotions/runs"}}
    own["sort"] = {"choices": ("f1_macro", "map"), "help": "the validation score to sort by; none: the newest first"}
    sys.exit(run_script(main, __doc__, shown=(), **own))
