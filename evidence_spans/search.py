"""Search for hyper-parameters by successive halving on validation; started again, it goes on where it was.

    python evidence_spans/search.py --sample --trials 9
    python evidence_spans/search.py --data_dir ... --trials 27 --run_dir evidence_spans/runs/my-search

Trials are drawn from space() below, which you may edit. All of them train for one epoch of their own schedule, the best
third goes on to three epochs, the best third of those to nine, until the last are through; then the best is trained
anew, whole, in winner/. The folder is --run_dir, or the name that a run of this config would have, with -search.

    study.json     what is searched            trial-00/ ...  each trial's run
    trials.jsonl   one line a trial and rung   winner/        the run of the best, the only one that scores test

Splits, their seed, the metric and the random seed are the config's: they are never searched. No trial scores test.
"""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from common.checkpoint import read_json, write_json, write_text
from evidence_spans import train
from evidence_spans.config import Config, UnfitSettings, UserError, run_config, run_path, run_script, shown
from evidence_spans.dataset import fingerprint, load_splits
from evidence_spans.model import autocast_dtype, pick_device
from evidence_spans.report import table


def space(config: Config) -> dict:
    """What is drawn for each trial: a list of values, or a distribution of scipy."""
    from scipy.stats import loguniform, randint, uniform  # slow to import

    return {
        "learning_rate": loguniform(config.learning_rate / 3, config.learning_rate * 3),
        "batch_size": sorted({max(config.batch_size // 2, 1), config.batch_size, config.batch_size * 2}),
        "epochs": randint(max(config.epochs // 2, 1), config.epochs + 1),
        "max_length": sorted({config.max_length * 2 // 3, config.max_length}),
        "doc_stride": sorted({config.doc_stride // 2, config.doc_stride}),
        "warmup_ratio": uniform(0, 0.2),
    }


def draw_trials(config: Config, trials: int, search_seed: int) -> list[dict]:
    """So many settings from space(config), the same ones for the same seed; floats with three digits."""
    from sklearn.model_selection import ParameterSampler

    drawn = []
    for settings in ParameterSampler(space(config), trials, random_state=search_seed):
        plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in sorted(settings.items())}
        drawn.append({name: float(f"{v:.3g}") if isinstance(v, float) else v for name, v in plain.items()})
    return drawn


def open_study(folder: Path, study: dict) -> dict[tuple[int, int], dict]:
    """The lines of trials.jsonl so far, by trial and rung. Raises UserError for another study's folder."""
    if (folder / "study.json").exists():
        saved, study = read_json(folder / "study.json"), json.loads(json.dumps(study))
        if differing := [name for name in saved if study.get(name) != saved[name]]:
            raise UserError(f"{folder} holds another search ({', '.join(differing)} differ). Give another --run_dir")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and no search. Give another --run_dir")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "study.json", study)
    path = folder / "trials.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = text[: text.rfind("\n") + 1]  # without a line that a kill cut short
    write_text(path, text)
    return {(line["trial"], line["rung"]): line for line in map(json.loads, text.splitlines())}


def run_trial(config: Config, epochs: int, metric: str) -> dict | int:
    """Train up to so many epochs: the best validation score, or why there is none; an exit status if stopped."""
    began = time.perf_counter()
    try:
        if status := train.main(config, pause_after=min(epochs, config.epochs)):
            return status
    except (UnfitSettings, torch.OutOfMemoryError) as error:  # of this trial; any other error ends the search
        message = "out of GPU memory" if isinstance(error, torch.OutOfMemoryError) else " ".join(str(error).split())
        return {"score": None, "error": message, "seconds": time.perf_counter() - began}
    lines = (run_path(config) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [record[metric] for record in map(json.loads, lines) if record["event"] == "evaluation"]
    return {"score": max(scores), "error": None, "seconds": time.perf_counter() - began}


def ranked(outcomes: dict[int, dict]) -> list[int]:
    """Trials by score, the best first, the earlier of two equal ones first; without those that failed."""
    scored = {trial: outcome["score"] for trial, outcome in outcomes.items() if outcome["score"] is not None}
    return sorted(scored, key=lambda trial: (-scored[trial], trial))


def results_table(drawn: list[dict], outcomes: dict[int, dict]) -> list[str]:
    """Each trial's settings, how far it went and its score, the best first."""
    order = ranked(outcomes)
    last_rung = max(outcome["rung"] for outcome in outcomes.values())
    rows = []
    for trial in [*order, *sorted(outcomes.keys() - set(order))]:
        outcome, settings = outcomes[trial], drawn[trial]
        finished = outcome["rung"] >= min(last_rung, settings["epochs"])
        end = "failed" if outcome["error"] else "finished" if finished else "stopped"
        values = [f"{value:g}" for value in settings.values()]
        epochs = min(outcome["rung"], settings["epochs"])
        rows.append([trial, *values, epochs, end, outcome["score"], f"{outcome['seconds']:.0f}"])
    return table(["trial", *drawn[0], "epochs trained", "end", "validation score", "seconds"], rows)


def main(config: Config, trials: int, eta: int, search_seed: int) -> int | None:
    # Setup
    for name, value, least in (("trials", trials, 1), ("eta", eta, 2), ("search_seed", search_seed, 0)):
        if not least <= value < 2**32:
            raise UserError(f"--{name} {value} is out of range: at least {least}, below 2**32")
    folder = run_path(config) if config.run_dir else run_path(config).with_name(run_path(config).name + "-search")
    drawn = draw_trials(config, trials, search_seed)
    train.main(config, check=True)  # what is wrong for every trial ends the search here
    study = {"config": run_config(config), "trials": trials, "eta": eta, "search_seed": search_seed, "drawn": drawn}
    study |= {"data_sha256": fingerprint(load_splits(config)[0])}
    study |= {"autocast": str(autocast_dtype(config.amp, pick_device()))}
    known = open_study(folder, study)

    # Successive halving; a rung is named by the epochs that it trains up to
    outcomes: dict[int, dict] = {}
    alive, rung = list(range(trials)), 1
    while alive:
        for trial in alive:
            if (trial, rung) not in known:
                changes = ", ".join(f"{name} {value:g}" for name, value in drawn[trial].items())
                print(f"trial {trial} up to epoch {rung}: {changes}")
                trial_config = replace(config, run_dir=str(folder / f"trial-{trial:02d}"), **drawn[trial])
                outcome = run_trial(trial_config, rung, config.metric)
                if isinstance(outcome, int):
                    return outcome
                known[trial, rung] = {"trial": trial, "rung": rung, **outcome, **drawn[trial]}
                with open(folder / "trials.jsonl", "a", encoding="utf-8", newline="\n") as file:
                    file.write(json.dumps(known[trial, rung]) + "\n")
            earlier = outcomes.get(trial, {"seconds": 0.0})["seconds"]
            outcomes[trial] = known[trial, rung] | {"seconds": known[trial, rung]["seconds"] + earlier}
        alive = ranked({trial: outcomes[trial] for trial in alive})
        if all(drawn[trial]["epochs"] <= rung for trial in alive):
            break
        alive = alive[: math.ceil(len(alive) / eta)]
        rung *= eta

    # The winner
    print("\n".join(results_table(drawn, outcomes)[:-1]))
    if not alive:
        raise UserError(f"no trial has a score; the first: {outcomes[0]['error']}")
    print(f"best: trial {alive[0]}, trained anew and whole, and only now scored on test")
    return train.main(replace(config, run_dir=str(folder / "winner"), **drawn[alive[0]])) or print(
        f"search in {shown(folder)}"
    )


if __name__ == "__main__":
    flags = {
        "trials": {"type": int, "default": 27, "help": "settings that are drawn"},
        "eta": {"type": int, "default": 3, "help": "one trial in eta goes on, for eta times the epochs"},
        "search_seed": {"type": int, "default": 0, "help": "seed of the draw"},
    }
    sys.exit(run_script(main, __doc__, **flags))
