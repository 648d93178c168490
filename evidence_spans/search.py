"""Search for hyper-parameters by successive halving on validation; started again, it goes on where it was.

    python evidence_spans/search.py --sample --trials 9
    python evidence_spans/search.py --data_dir ... --trials 27 --run_dir evidence_spans/runs/my-search

Trials are drawn from space() below, which you may edit. All train for one epoch of their own schedule, the best third
for three, the best third of those for nine, until the last are through; then the best is trained anew, whole, in
winner/, the only run that scores test. The folder is --run_dir, or that of a run of this config with -search behind
its name; its metrics.jsonl has a line for each trial and rung.
"""

import json
import math
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from pydantic import ValidationError

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.run import Run
from evidence_spans import train
from evidence_spans.cli import displayed, first_error, run_path, run_script, run_settings
from evidence_spans.config import Config
from evidence_spans.dataset import data_digests
from evidence_spans.report import table
from evidence_spans.windows import UnfitSettings


def space(config: Config) -> dict:
    """What is drawn for each trial: a list of numbers, or a distribution of scipy."""
    from scipy.stats import loguniform, randint, uniform

    return {
        "learning_rate": loguniform(rate / 3, rate * 3) if (rate := config.learning_rate) else [0.0],
        "batch_size": sorted({max(config.batch_size // 2, 1), config.batch_size, config.batch_size * 2}),
        "epochs": randint(max(config.epochs // 2, 1), config.epochs + 1),
        "max_length": sorted({config.max_length * 2 // 3, config.max_length}),
        "doc_stride": sorted({config.doc_stride // 2, config.doc_stride}),
        "warmup_ratio": uniform(0, 0.2),
    }


def space_table(config: Config) -> list[str]:
    """What is drawn: each setting, and the values or, of a distribution, the ends between which they lie."""
    rows = []
    for name, values in space(config).items():
        if isinstance(values, list):
            rows.append([name, ", ".join(f"{value:g}" for value in values)])
        else:
            low, high = values.support()
            rows.append([name, f"{low:g} to {high:g} ({values.dist.name})"])
    return table(["setting", "drawn from"], rows)


def draw_trials(config: Config, trials: int, search_seed: int) -> list[dict]:
    """So many settings from space(config), the same ones for the same seed; floats with three digits."""
    from sklearn.model_selection import ParameterSampler

    drawn = []
    for settings in ParameterSampler(space(config), trials, random_state=search_seed):
        plain = {name: float(f"{v:.3g}") if isinstance(v, float) else int(v) for name, v in settings.items()}
        drawn.append(dict(sorted(({"epochs": config.epochs} | plain).items())))
    return drawn


def trial_config(config: Config, run_dir: Path, settings: dict) -> Config:
    """The config with drawn settings and a folder of its own."""
    return Config(**config.model_dump() | settings | {"run_dir": str(run_dir)})


def run_trial(config: Config, run_dir: Path, settings: dict, epochs: int) -> dict | int:
    """Train up to so many epochs: the best validation score, or why there is none; an exit status if stopped."""
    try:
        config = trial_config(config, run_dir, settings)
        if status := train.main(config, pause_after=min(epochs, config.epochs)):
            return status
    except ValidationError as error:  # drawn settings that cannot be
        return {"score": None, "error": first_error(error, {}, Path("drawn"))}
    except (UnfitSettings, torch.OutOfMemoryError) as error:  # of this trial; any other error ends the search
        message = "out of GPU memory" if isinstance(error, torch.OutOfMemoryError) else " ".join(str(error).split())
        return {"score": None, "error": message}
    lines = (run_path(config) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [record[config.metric] for record in map(json.loads, lines) if record["event"] == "evaluation"]
    return {"score": max(scores), "error": None}


def ranked(outcomes: dict[int, dict]) -> list[int]:
    """Trials by score, the best first, the earlier of two equal ones first; without those that failed."""
    scored = {trial: outcome["score"] for trial, outcome in outcomes.items() if outcome["score"] is not None}
    return sorted(scored, key=lambda trial: (-scored[trial], trial))


def tied_with(trial: int, outcomes: dict[int, dict]) -> list[int]:
    """The trials with the score of this one, itself among them."""
    return [other for other in ranked(outcomes) if outcomes[other]["score"] == outcomes[trial]["score"]]


def results_table(drawn: list[dict], outcomes: dict[int, dict]) -> list[str]:
    """Each trial's settings, how far it went and its score, the best first."""
    order = ranked(outcomes)
    rows = []
    for trial in [*order, *sorted(outcomes.keys() - set(order))]:
        outcome, settings = outcomes[trial], drawn[trial]
        values = [f"{value:g}" for value in settings.values()]
        rows.append([trial, *values, min(outcome["rung"], settings["epochs"]), outcome["error"] or outcome["score"]])
    return table(["trial", *drawn[0], "epochs trained", "validation score"], rows)


def main(config: Config, trials: int, eta: int, search_seed: int) -> int | None:
    # Setup
    for name, value, least in (("trials", trials, 1), ("eta", eta, 2), ("search_seed", search_seed, 0)):
        if not least <= value < 2**32:
            raise UserError(f"--{name} {value} is out of range: at least {least}, below 2**32")
    folder = run_path(config) if config.run_dir else run_path(config).with_name(run_path(config).name + "-search")
    drawn = draw_trials(config, trials, search_seed)
    print("\n".join(space_table(config)[:-1]))
    train.main(config, check=True)  # what is wrong for every trial ends the search here

    # Resume: the folder is a run whose evaluations are the trials' outcomes, one at each rung
    study = {"trials": trials, "eta": eta, "search_seed": search_seed}
    dtype = autocast_dtype(config.amp, pick_device())
    run = Run(folder, run_settings(config) | study, {"autocast": str(dtype)}, data=data_digests(config))
    run.restore({})  # cuts off what a kill left of a line
    lines = [line for line in run.evaluations() if line["settings"] == drawn[line["trial"]]]
    outcomes = {line["trial"]: line for line in lines}  # the last of each trial
    known = {(line["trial"], line["rung"]): line for line in lines}

    # Successive halving; a rung is named by the epochs that it trains up to
    alive, rung, all_tie = list(range(trials)), 1, True
    while alive:
        for trial in alive:
            if (trial, rung) in known:
                continue
            changes = ", ".join(f"{name} {value:g}" for name, value in drawn[trial].items())
            print(f"trial {trial} up to epoch {rung}: {changes}")
            outcome = run_trial(config, folder / f"trial-{trial:02d}", drawn[trial], rung)
            if isinstance(outcome, int):
                run.close()
                return outcome
            if outcome["error"]:
                print(f"trial {trial} is left out: {outcome['error']}")
            outcomes[trial] = known[trial, rung] = {"trial": trial, "rung": rung, "settings": drawn[trial], **outcome}
            run.log({"event": "evaluation", **outcomes[trial]})
            run.save_last({})
        reached = {trial: known[trial, rung] for trial in alive}
        alive = ranked(reached)
        all_tie = all_tie and len(tied_with(alive[0], reached) if alive else []) == len(alive)
        if all(drawn[trial]["epochs"] <= rung for trial in alive):
            break
        kept = alive[: math.ceil(len(alive) / eta)]
        tied = tied_with(kept[-1], reached)
        if tied[-1] not in kept:
            print(f"{len(tied)} trials tie at {reached[tied[0]]['score']:.4f}: the earlier ones go on")
        alive = kept
        rung *= eta
    run.close()

    # The winner
    print("\n".join(results_table(drawn, outcomes)[:-1]))
    if not alive:
        raise UserError(f"no trial has a score; the first: {outcomes[0]['error']}")
    best, tied, scored = alive[0], tied_with(alive[0], reached), len(ranked(outcomes))
    if all_tie and scored > 1:  # at each rung, where all have the same epochs
        print(f"all {scored} trials tie: none is best, none is trained anew; try more epochs or validation rows")
        return None
    others = f", with which {len(tied) - 1} others tie" * (len(tied) > 1)
    print(f"best: trial {best}{others}; it is trained anew and whole, and only now scored on test")
    status = train.main(trial_config(config, folder / "winner", drawn[best]))
    if status:
        return status
    for last in folder.glob("trial-*/last.pt"):  # no trial goes on any more
        last.unlink()
    print(f"search in {displayed(folder)}")
    return None


if __name__ == "__main__":
    flags = {
        "trials": {"type": int, "default": 27, "help": "settings that are drawn (default: 27)"},
        "eta": {"type": int, "default": 3, "help": "one trial in eta goes on, for eta times the epochs (default: 3)"},
        "search_seed": {"type": int, "default": 0, "help": "seed of the draw (default: 0)"},
    }
    sys.exit(run_script(main, __doc__, **flags))
