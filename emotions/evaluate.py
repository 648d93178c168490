"""Score a run's best model on validation and, where there is one, on test; write report.md and predictions/.

    python emotions/evaluate.py --run_dir emotions/runs/...
"""

import json
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.files import write_text
from common.checkpoint.pretrained import load_shape
from common.checkpoint.run import Run, read_best, warn_of_precision
from emotions.cli import run_path, run_script
from emotions.config import Config
from emotions.dataset import Draw, Split, absent, fingerprint, load_splits, make_loader, positives, sorted_batches
from emotions.labels import groupings, label_numbers
from emotions.loss import class_weights, emotion_loss
from emotions.model import EmotionClassifier, find_tokenizer, label_names, load_model
from emotions.parallel import Processes, all_reduce, watchdog
from emotions.report import report
from emotions.sampling import draw_weights, rank_batches
from emotions.thresholds import Thresholds, cross_fitted, read_thresholds, thresholds_json, tune


def predict_logits(
    model: EmotionClassifier,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    dtype: torch.dtype | None,
    processes: Processes | None = None,
) -> Tensor:
    """Logits (N, L) in fp32 on the CPU, in the order of the rows, in every process; batches are sorted by length.

    The processes take turns at the batches. A batch that hangs ends them; a watchdog of the caller's is off afterwards.
    """
    device = next(model.parameters()).device
    processes = processes or Processes(0, 1, device)
    own = rank_batches(sorted_batches(split.lengths, config.eval_batch_size), processes.rank, processes.world)
    draws = [[Draw(number, split.rows[number].text) for number in numbers] for numbers, _ in own]

    logits = torch.zeros(len(split), model.config.num_labels)
    model.eval()
    loader = make_loader(draws, split, tokenizer, config)
    bar = tqdm(loader, leave=False, disable=processes.rank > 0 or None, desc="evaluating")
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    # no_grad, not inference_mode: a sharded model keeps what it gathers here for the next training step
    with watchdog(config.stall_seconds) as restart_watchdog, torch.no_grad(), autocast:
        for batch, (numbers, counts) in zip(bar, own):
            restart_watchdog()
            del batch["labels"], batch["known"]
            output = model(**{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
            if counts:
                logits[numbers] = output.float().cpu()
        return all_reduce(logits, processes)


def probabilities(logits: Tensor) -> np.ndarray:
    """(N, L) logits -> probabilities: one sigmoid, the only one."""
    return logits.double().sigmoid().numpy()


def mean_loss(logits: Tensor, split: Split, weights: Tensor | None, config: Config) -> float:
    labels, known = torch.from_numpy(split.labels).float(), torch.from_numpy(split.known)
    return emotion_loss(logits, labels, known, config, weights).mean().item()


def label_metrics(split: Split, predictions: np.ndarray) -> dict:
    """multilabel_metrics of predictions (N, L)."""
    from common.metrics import multilabel_metrics  # scikit-learn, a second that --help has no use for

    return multilabel_metrics(split.labels, predictions, split.names, split.known)


def group_metrics(split: Split, predictions: np.ndarray, groups: dict[str, tuple[str, ...]]) -> dict:
    """multilabel_metrics of predictions (N, L) of groups of labels: one holds where any of its labels does.

    Where a row knows only some of a group's labels, the group is known if one of those holds, else not.
    """
    from common.metrics import multilabel_metrics

    columns, known = [label_numbers(names, split.names) for names in groups.values()], split.known
    true, predicted = (
        np.stack([(cells & known)[:, own].any(axis=1) for own in columns], axis=1)
        for cells in (split.labels, predictions)
    )
    decided = np.stack([known[:, own].all(axis=1) for own in columns], axis=1) | true
    return multilabel_metrics(true, predicted, tuple(groups), decided)


def score_split(logits: Tensor, split: Split, thresholds: Thresholds, loss: float) -> dict:
    """All scores of (N, L) logits: at .5, at the shared and at the per-label thresholds, which are probabilities."""
    from common.metrics import mean_average_precision

    probability = probabilities(logits)
    cuts = {"at_half": 0.5, "at_shared": thresholds.shared, "at_per_label": thresholds.per_label}
    predictions = {rule: probability >= cut for rule, cut in cuts.items()}
    scores = {"rows": len(split), "loss": loss, "map": mean_average_precision(split.labels, probability, split.known)}
    scores["absent"] = absent(split)
    scores |= {rule: label_metrics(split, cells) for rule, cells in predictions.items()}
    for name, groups in groupings(split.names).items():
        scores[name] = {rule: group_metrics(split, cells, groups) for rule, cells in predictions.items()}
    return scores


def cross_fitted_scores(logits: Tensor, split: Split, config: Config) -> dict:
    """Scores on rows whose thresholds were tuned on other rows. The epoch alone was chosen with these."""
    settings = config.threshold_smoothing, config.split_seed
    shared, per_label = cross_fitted(logits.double().numpy(), split.labels, split.known, *settings)
    return {"at_shared": label_metrics(split, shared), "at_per_label": label_metrics(split, per_label)}


def answer(
    probability: np.ndarray, thresholds: np.ndarray, names: tuple[str, ...]
) -> tuple[list[str], dict[str, float]]:
    """One text's labels and all probabilities by name, the likeliest first; all arguments are (L,)."""
    order = np.argsort(-probability, kind="stable")
    predicted = [names[n] for n in order if probability[n] >= thresholds[n]]
    return predicted, {names[n]: round(float(probability[n]), 6) for n in order}


def validate(
    model: EmotionClassifier,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    weights: Tensor | None,
    config: Config,
    dtype: torch.dtype | None,
    processes: Processes,
) -> tuple[dict, dict]:
    """Validation scores, at .5 and at the one threshold that is best there, and all thresholds tuned there."""
    from common.metrics import mean_average_precision

    logits = predict_logits(model, split, tokenizer, config, dtype, processes)
    if not torch.isfinite(logits).all():
        raise UserError("the validation logits are not finite; best/ is untouched. A lower learning_rate may help")
    probability, exact = probabilities(logits), logits.double().numpy()
    thresholds = tune(exact, split.labels, split.known, config.threshold_smoothing)
    scores = {
        "loss": mean_loss(logits, split, weights, config),
        "map": mean_average_precision(split.labels, probability, split.known),
        "f1_macro_at_half": label_metrics(split, probability >= 0.5)["f1_macro"],
        "f1_macro": label_metrics(split, exact >= thresholds.shared)["f1_macro"],
    }
    return scores, thresholds_json(thresholds, split.names)


def evaluate_run(
    run: Run,
    splits: dict[str, Split],
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    dtype: torch.dtype | None,
) -> dict:
    """Scores of the best model on every split but train; writes predictions/ and report.md into the run."""
    from common.metrics import too_few

    train = splits["train"]
    names = train.names
    model, thresholds = read_best(run.path, lambda best: (load_model(best, config), read_thresholds(best, names)))
    model = model.to(pick_device())
    drawn = draw_weights(train, config)
    weights = class_weights(config.class_weights, drawn @ train.labels, drawn @ train.known)
    per_label = dict(zip(names, thresholds.per_label.tolist()))
    scores: dict = {"thresholds": {"shared": thresholds.shared, "per_label": per_label}, "test": None}
    (run.path / "predictions").mkdir(exist_ok=True)
    for name in [name for name in splits if name != "train"]:
        split = splits[name]
        logits = predict_logits(model, split, tokenizer, config, dtype)
        scores[name] = score_split(logits, split, thresholds, mean_loss(logits, split, weights, config))
        if name == "validation":
            scores[name]["cross_fitted"] = cross_fitted_scores(logits, split, config)
            scores[name]["too_few"] = too_few(len(split), positives(split))
        lines = []
        for row, probability in zip(split.rows, probabilities(logits)):
            predicted, by_name = answer(probability, thresholds.per_label, names)
            line = {"line": row.line, "id": row.id, "text": row.text, "labels": [names[n] for n in row.labels]}
            line |= {"predicted": predicted, "probabilities": by_name}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    write_text(run.path / "report.md", report(scores, splits, run.evaluations(), config))
    return scores


def main(config: Config) -> None:
    path = run_path(config)
    dtype = autocast_dtype(config.amp, pick_device())
    # Before the lock: where there is no run, none is made
    tokenizer, shape = read_best(path, lambda folder: (find_tokenizer(config, folder), load_shape(folder)))
    splits = load_splits(config, tokenizer, label_names(shape))
    run = Run(path, None, {"data_sha256": fingerprint(splits)})
    warn_of_precision(path, dtype)
    if run.results is None:
        print("the run is not finished: this is its best epoch so far", file=sys.stderr)
    evaluate_run(run, splits, tokenizer, config, dtype)
    run.close()
    print((path / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__, trained=True))
