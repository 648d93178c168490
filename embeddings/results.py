"""Runs side by side, the newest first: settings that differ, scores, when, how long, the command. Writes nothing.

    python embeddings/results.py                                   # all of embeddings/runs
    python embeddings/results.py --runs runs/a runs/b --sort nDCG@10
"""

import sys
from datetime import timedelta
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from common.checkpoint.run import read_run
from embeddings.cli import PROJECT, displayed, run_script
from embeddings.config import Config
from embeddings.report import few_judged, table

SCORES = ("spearman", "nDCG@10", "MRR@10", "accuracy", "recall@10")  # a run has the first, or the others


def read_row(path: Path) -> tuple[dict, dict]:
    """A run's settings, and the other cells of its row: None where there is none (yet). Raises UserError."""
    run = read_run(path)
    results = read_json(path / "results.json") if (path / "results.json").exists() else {}
    try:
        cells = {"chosen on": results.get("chosen_on")}
        cells |= {f"validation {name}": results["validation"].get(name) if results else None for name in SCORES}
        cells["test spearman"] = results["test"]["spearman"] if results and results["test"] else None
        cells["without adapter"] = results["base"] if results else None
        cells["caution"] = few_judged(results) if results else "unfinished"
    except KeyError as error:
        raise UserError(f"{path / 'results.json'} has no {error}: not a run of this project") from error
    cells["started"] = run["started"][:19].replace("T", " ") if "started" in run else None
    cells["time"] = timedelta(seconds=round(results["seconds"])) if results else None
    return run["config"], cells | {"step": results.get("step"), "command": run.get("command")}


def main(config: Config, runs: list[str], sort: str | None) -> None:
    paths = [Path(run).resolve() for run in runs]
    paths = paths or sorted(path.parent for path in (PROJECT / "runs").glob("*/metrics.jsonl"))
    if not paths:
        raise UserError(f"{PROJECT / 'runs'} holds no run: train first, or name run folders with --runs")
    rows, column = [(displayed(path), *read_row(path)) for path in paths], f"validation {sort}" if sort else "started"
    rows.sort(key=lambda row: (row[2][column] is not None, row[2][column]), reverse=True)
    names = dict.fromkeys(name for _, settings, _ in rows for name in settings)
    differing = [name for name in names if len({str(settings.get(name)) for _, settings, _ in rows}) > 1]
    shown = [name for name in rows[0][2] if name == column or any(cells[name] is not None for _, _, cells in rows)]
    lines = [[run, *(str(s.get(n, "-")) for n in differing), *(cells[n] for n in shown)] for run, s, cells in rows]
    print("\n".join(table(["run", *differing, *shown], lines)[:-1]))
    print(f"sorted by {column}")


if __name__ == "__main__":
    own = {"runs": {"nargs": "+", "default": [], "help": "run folders; none: all of embeddings/runs"}}
    own["sort"] = {"choices": SCORES, "help": "the validation score to sort by; none: the newest run first"}
    sys.exit(run_script(main, __doc__, shown=(), **own))
