"""Runs side by side, the newest first: settings that differ, scores, when, how long, the command. Writes nothing.

    python afqmc/results.py                                   # all of afqmc/runs
    python afqmc/results.py --runs runs/a runs/b --sort accuracy
"""

import sys
from datetime import timedelta
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from afqmc.cli import PROJECT, displayed, run_script
from afqmc.config import Config
from afqmc.report import cautions, table, untuned
from common.checkpoint import UserError
from common.checkpoint.files import read_json
from common.checkpoint.run import read_run

SCORES = ("f1_macro", "accuracy", "f1_weighted")  # of two labels those at .5


def read_row(path: Path) -> tuple[dict, dict]:
    """A run's settings, and the other cells of its row: None where there is none (yet). Raises UserError."""
    run, cells = read_run(path), {}
    results = read_json(path / "results.json") if (path / "results.json").exists() else {}
    try:
        for split in ("validation", "test"):
            scores = untuned(results[split]) if results.get(split) else {}
            cells |= {f"{split} {name}": scores.get(name) for name in SCORES}
        cells["caution"] = "; ".join(cautions(results)) or None if results else "unfinished"
    except KeyError as error:
        raise UserError(f"{path / 'results.json'} has no {error}: not a run of this project") from error
    cells["started"] = run["started"][:19].replace("T", " ") if "started" in run else None
    cells["time"] = timedelta(seconds=round(results["seconds"])) if results else None
    return run["config"], cells | {"epoch": results.get("epoch"), "command": run.get("command")}


def main(config: Config, runs: list[str], sort: str | None) -> None:
    paths = [Path(run).resolve() for run in runs]
    paths = paths or sorted(path.parent for path in (PROJECT / "runs").glob("*/metrics.jsonl"))
    if not paths:
        raise UserError(f"{PROJECT / 'runs'} holds no run: train first, or name run folders with --runs")
    rows, column = [(displayed(path), *read_row(path)) for path in paths], f"validation {sort}" if sort else "started"
    rows.sort(key=lambda row: (row[2][column] is not None, row[2][column]), reverse=True)
    names = dict.fromkeys(name for _, settings, _ in rows for name in settings)
    differing = [name for name in names if len({str(settings.get(name)) for _, settings, _ in rows}) > 1]
    lines = [[run, *(str(settings.get(n, "-")) for n in differing), *cells.values()] for run, settings, cells in rows]
    print("\n".join(table(["run", *differing, *rows[0][2]], lines)[:-1]))
    print(f"sorted by {column}; scores of two labels are those at .5")


if __name__ == "__main__":
    own = {"runs": {"nargs": "+", "default": [], "help": "run folders; none: all of afqmc/runs"}}
    own["sort"] = {"choices": SCORES, "help": "the validation score to sort by; none: the newest run first"}
    sys.exit(run_script(main, __doc__, shown=(), **own))
