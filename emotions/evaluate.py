"""Score a run's best model on validation and, where there is one, on test; write report.md and predictions/.

    python emotions/evaluate.py --run_dir emotions/runs/...
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import Run, RunError, begun_in, best_folder, write_text
from common.metrics import mean_average_precision, multilabel_metrics
from emotions.config import Config, run_path, run_script, saved_config
from emotions.dataset import Draw, Split, fingerprint, load_splits, make_loader, repeated_in_test, sorted_batches
from emotions.labels import EMOTIONS, GROUPINGS, NUMBERS
from emotions.loss import class_weights, emotion_loss
from emotions.model import MODEL_INPUTS, EmotionClassifier, autocast_dtype, load_model, load_tokenizer, pick_device
from emotions.parallel import Processes, all_reduce, watchdog
from emotions.report import report
from emotions.sampling import draw_weights
from emotions.thresholds import Thresholds, cross_fitted, read_thresholds


def predict_logits(
    model: EmotionClassifier,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    processes: Processes,
    each_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Logits (N, L) in fp32 on the CPU, in the order of the rows, in every process; batches are sorted by length.

    The processes take turns at the batches, equally many each: where they run out, one repeats the first for nothing.
    """
    rank, world, device = processes
    batches = sorted_batches(split.lengths, config.eval_batch_size)
    turns = -(-len(batches) // world)
    own = (batches + batches[:1] * (turns * world - len(batches)))[rank::world]
    draws = [[Draw(place, split.rows[place].text) for place in places] for places in own]
    logits = torch.zeros(len(split), len(EMOTIONS))
    dtype = autocast_dtype(config.amp, device)
    model.eval()
    loader = make_loader(draws, split, tokenizer, config)
    bar = tqdm(loader, leave=False, disable=True if rank else None, desc="evaluating")
    # no_grad, not inference_mode: a sharded model keeps what it gathers here for the next training step
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for turn, batch in enumerate(bar):
            each_batch()
            inputs = {name: batch[name].to(device, non_blocking=True) for name in MODEL_INPUTS if name in batch}
            output = model(**inputs).float().cpu()
            if rank + turn * world < len(batches):
                logits[own[turn]] = output
    return all_reduce(logits, processes)


def probabilities(logits: Tensor) -> np.ndarray:
    """(N, L) logits -> probabilities: one sigmoid, the only one."""
    return logits.double().sigmoid().numpy()


def mean_loss(logits: Tensor, split: Split, weights: Tensor | None, config: Config) -> float:
    labels, known = torch.from_numpy(split.labels).float(), torch.from_numpy(split.known)
    return emotion_loss(logits, labels, known, config, weights).mean().item()


def score_split(logits: Tensor, split: Split, thresholds: Thresholds, loss: float) -> dict:
    """All scores of (N, L) logits: at .5, at the shared and at the per-label thresholds, which are probabilities."""
    labels, known, probability = split.labels, split.known, probabilities(logits)
    cuts = {"at_half": 0.5, "at_shared": thresholds.shared, "at_per_label": thresholds.per_label}
    predictions = {rule: probability >= cut for rule, cut in cuts.items()}
    scores = {"rows": len(split), "loss": loss, "map": mean_average_precision(labels, probability, known)}
    scores |= {rule: multilabel_metrics(labels, cells, EMOTIONS, known) for rule, cells in predictions.items()}
    for name, groups in GROUPINGS.items():
        scores[name] = {rule: group_metrics(labels, cells, known, groups) for rule, cells in predictions.items()}
    return scores


def group_metrics(labels: np.ndarray, predictions: np.ndarray, known: np.ndarray, groups: dict) -> dict:
    """multilabel_metrics of groups of labels: one holds where any of its labels does.

    Where a row knows only some of a group's labels, the group is known if one of those holds, else not.
    """
    columns = [[NUMBERS[name] for name in names] for names in groups.values()]
    true, predicted = (
        np.stack([(matrix & known)[:, own].any(axis=1) for own in columns], axis=1) for matrix in (labels, predictions)
    )
    decided = np.stack([known[:, own].all(axis=1) for own in columns], axis=1) | true
    return multilabel_metrics(true, predicted, tuple(groups), decided)


def cross_fitted_scores(logits: Tensor, split: Split, config: Config) -> dict:
    """Scores on rows whose thresholds were tuned on other rows. The epoch alone was chosen with these."""
    settings = config.threshold_smoothing, config.split_seed
    predictions = cross_fitted(logits.double().numpy(), split.labels, split.known, *settings)
    scores = [multilabel_metrics(split.labels, cells, EMOTIONS, split.known) for cells in predictions]
    return dict(zip(("at_shared", "at_per_label"), scores))


def answer(probability: np.ndarray, thresholds: np.ndarray) -> dict:
    """One text's emotions, the likeliest first, and all probabilities; both arguments are (L,)."""
    order = np.argsort(-probability, kind="stable")
    predicted = [EMOTIONS[n] for n in order if probability[n] >= thresholds[n]]
    return {"predicted": predicted, "probabilities": {EMOTIONS[n]: round(float(probability[n]), 6) for n in order}}


def prediction_line(row, probability: np.ndarray, thresholds: np.ndarray) -> str:
    """A scored row as predictions/ holds it."""
    line = {"line": row.line, "id": row.id, "text": row.text, "labels": [EMOTIONS[n] for n in row.labels]}
    return json.dumps(line | answer(probability, thresholds), ensure_ascii=False) + "\n"


def evaluate_run(
    run: Run, splits: dict[str, Split], tokenizer: PreTrainedTokenizerFast, config: Config, device: torch.device
) -> dict:
    """Scores of the best model on every split but train; writes predictions/ and report.md into the run."""
    folder, train = best_folder(run.path), splits["train"]
    model = load_model(folder, config).to(device)
    thresholds = read_thresholds(folder)
    drawn = draw_weights(train, config)
    weights = class_weights(config.class_weights, drawn @ train.labels, drawn @ train.known)
    per_label = dict(zip(EMOTIONS, thresholds.per_label.tolist()))
    scores: dict = {"thresholds": {"shared": thresholds.shared, "per_label": per_label}}
    (run.path / "predictions").mkdir(exist_ok=True)
    for name, split in list(splits.items())[1:]:
        with watchdog(config.stall_seconds) as restart_watchdog:
            logits = predict_logits(model, split, tokenizer, config, Processes(0, 1, device), restart_watchdog)
        scores[name] = score_split(logits, split, thresholds, mean_loss(logits, split, weights, config))
        if name == "validation":
            scores[name]["cross_fitted"] = cross_fitted_scores(logits, split, config)
        lines = [prediction_line(row, p, thresholds.per_label) for row, p in zip(split.rows, probabilities(logits))]
        write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    history = [record for record in run.history() if record["event"] == "evaluation"]
    write_text(run.path / "report.md", report(scores, splits, repeated_in_test(splits), history, config))
    return scores


def check_data(run: Run, splits: dict[str, Split], config: Config) -> None:
    """Refuse to go on with, or to score, other rows than a run began with: training rows could become test rows."""
    if run.environment.get("data_sha256") != fingerprint(splits):
        raise RunError(f"{config.data_dir} does not hold the rows that {run.path} was begun with: bring them back")


def say_precision(path: Path, config: Config, device: torch.device) -> None:
    """Tell where this machine or --amp computes in another type than the run was trained in."""
    trained = begun_in(path).get("autocast")
    if trained != str(now := autocast_dtype(config.amp, device)):
        print(f"trained with autocast {trained}, now {now}: scores can differ from the run's own", file=sys.stderr)


def main(config: Config) -> None:
    path, device = run_path(config), pick_device()
    tokenizer = load_tokenizer(config, best_folder(path))  # before the lock: where there is no run, none is made
    splits = load_splits(config, tokenizer)
    run = Run(path, saved_config(path / "config.json"), {})
    check_data(run, splits, config)
    say_precision(path, config, device)
    if run.results is None:
        print("the run is not finished: this is its best epoch so far", file=sys.stderr)
    evaluate_run(run, splits, tokenizer, config, device)
    print((path / "report.md").read_text(encoding="utf-8"))
    run.close()


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__, trained=True))
