"""Runs side by side: in what their configs differ, and what they scored. Reads their folders, writes nothing.

    python redsm5_nli/results.py                                   # all of redsm5_nli/runs
    python redsm5_nli/results.py --runs runs/a runs/b --sort f1_positive
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import RunError, read_json
from redsm5_nli.config import ROOT, Config, UserError, run_script, shown
from redsm5_nli.report import table

SCORES = ("f1_macro", "f1_positive", "auprc")


def find_runs(folders: list[str]) -> list[Path]:
    """The given folders, or those of redsm5_nli/runs that hold a run, the folds of a cross-validation among them."""
    if folders:
        return [Path(folder) for folder in folders]
    found = sorted(path.parent for path in (ROOT / "redsm5_nli" / "runs").glob("**/config.json"))
    if not found:
        raise UserError("redsm5_nli/runs holds no run: train first, or name run folders with --runs")
    return found


def run_scores(path: Path) -> dict[str, float | str]:
    """Validation and test scores at .5 of a finished run; where it is not finished, a line of dashes."""
    if not (path / "results.json").exists():
        return {f"{split} {name}": "-" for split in ("validation", "test") for name in SCORES} | {"epoch": "unfinished"}
    results, scores = read_json(path / "results.json"), {}
    try:
        for split in ("validation", "test"):
            each = results[split]["at_half"] | {"auprc": results[split]["auprc"]}
            scores |= {f"{split} {name}": each[name] for name in SCORES}
        return scores | {"epoch": results["epoch"]}
    except KeyError as error:
        raise RunError(f"{path / 'results.json'} has no {error}: not a run of this project") from error


def main(config: Config, runs: list[str], sort: str) -> None:
    rows = []
    for path in find_runs(runs):
        settings = read_json(path / "config.json").get("config")
        if not isinstance(settings, dict):
            raise RunError(f"{path / 'config.json'} is not a run's config")
        rows.append((shown(path.resolve()), settings, run_scores(path)))
    fields = list(dict.fromkeys(name for _, settings, _ in rows for name in settings))
    differing = [name for name in fields if len({str(settings.get(name, "-")) for _, settings, _ in rows}) > 1]
    column = f"validation {sort}"
    rows.sort(key=lambda row: -row[2][column] if isinstance(row[2][column], float) else 1.0)
    header = ["run", *differing, *rows[0][2]]
    cells = [[run, *(str(config.get(name, "-")) for name in differing), *found.values()] for run, config, found in rows]
    print("\n".join(table(header, cells)[:-1]))
    print(f"sorted by {column}; all scores at the threshold .5")


if __name__ == "__main__":
    flags = {
        "runs": {"nargs": "+", "default": [], "help": "run folders; none: all of redsm5_nli/runs"},
        "sort": {"choices": SCORES, "default": "f1_macro", "help": "the validation score to sort by"},
    }
    sys.exit(run_script(main, __doc__, **flags))
