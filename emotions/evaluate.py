"""Score a run's best model on validation and, where there is one, on test; write report.md, .html and predictions/.

    python emotions/evaluate.py --run_dir emotions/runs/...
    python emotions/evaluate.py --run_dir emotions/runs/... --data more.csv    # any labelled file; writes nothing
"""

import json
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import ROOT, UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.files import write_text
from common.checkpoint.identity import file_digest
from common.checkpoint.pretrained import load_shape
from common.checkpoint.rows import data_file
from common.checkpoint.run import Run, best_folder, read_best, read_run, warn_of_use
from emotions.cli import displayed, run_path, run_script
from emotions.config import Config
from emotions.dataset import (
    Draw,
    Split,
    absent,
    data_digests,
    load_splits,
    make_loader,
    make_split,
    positives,
    read_rows,
    same_text,
    sorted_batches,
)
from emotions.html_report import page
from emotions.labels import groupings, label_numbers
from emotions.loss import class_weights, emotion_loss
from emotions.model import EmotionClassifier, find_tokenizer, label_names, load_model
from emotions.parallel import Processes, all_reduce, watchdog
from emotions.report import details, report, score_rows, table, worst_errors
from emotions.sampling import draw_weights, rank_batches
from emotions.thresholds import Thresholds, cross_fitted, read_thresholds, thresholds_json, tune


def predict_logits(
    model: EmotionClassifier,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    dtype: torch.dtype | None,
    processes: Processes | None = None,
    silent: bool = False,
) -> Tensor:
    """Logits (N, L) in fp32 on the CPU, in the order of the rows, in every process; batches are sorted by length.

    The processes take turns at the batches. A batch that hangs ends them; a watchdog of the caller's is off afterwards.
    """
    device = next(model.parameters()).device
    processes = processes or Processes(0, 1, device)
    own = rank_batches(sorted_batches(split.lengths, config.eval_batch_size), processes.rank, processes.world)
    draws = [[*map(Draw, numbers)] for numbers, _ in own]

    logits = torch.zeros(len(split), model.config.num_labels)
    model.eval()
    loader = make_loader(draws, split, tokenizer, config)
    bar = tqdm(loader, leave=False, disable=silent or processes.rank > 0 or None, desc="evaluating")
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


def score_split(logits: Tensor, split: Split, thresholds: Thresholds, loss: float | None) -> dict:
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


def one_answer(predictions: np.ndarray, names: tuple[str, ...]) -> list[str] | None:
    """The labels that all rows of predictions (N, L) have; None where rows differ."""
    return [names[n] for n in np.flatnonzero(predictions[0])] if (predictions == predictions[0]).all() else None


def evaluate_run(
    run: Run,
    splits: dict[str, Split],
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    dtype: torch.dtype | None,
) -> dict:
    """Scores of the best model on every split but train; writes predictions/ and the report into the run."""
    from common.metrics import too_few

    train = splits["train"]
    names = train.names
    model, thresholds = read_best(run.path, lambda best: (load_model(best, config), read_thresholds(best, names)))
    model = model.to(pick_device())
    drawn = draw_weights(train, config)
    weights = class_weights(config.class_weights, drawn @ train.labels, drawn @ train.known)
    per_label = dict(zip(names, thresholds.per_label.tolist()))
    scores: dict = {"thresholds": {"shared": thresholds.shared, "per_label": per_label}}
    scores |= dict.fromkeys(("validation", "test"))
    (run.path / "predictions").mkdir(exist_ok=True)
    for name in [name for name in splits if name != "train"]:
        split = splits[name]
        logits = predict_logits(model, split, tokenizer, config, dtype)
        scores[name] = score_split(logits, split, thresholds, mean_loss(logits, split, weights, config))
        if name == "validation":
            scores[name]["cross_fitted"] = cross_fitted_scores(logits, split, config)
            scores[name]["too_few"] = too_few(len(split), positives(split))
        lines, found = [], probabilities(logits)
        scores[name]["one_answer"] = one_answer(found >= thresholds.per_label, names)
        errors = worst_errors(split, found, thresholds.per_label)  # of the last split, which is test if there is one
        for row, probability in zip(split.rows, found):
            predicted, by_name = answer(probability, thresholds.per_label, names)
            line = {"line": row.line, "id": row.id, "text": row.text, "labels": [names[n] for n in row.labels]}
            line |= {"predicted": predicted, "probabilities": by_name}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    text = report(scores, splits, run.evaluations(), errors, config)
    write_text(run.path / "report.md", text)
    write_text(run.path / "report.html", page(text, run.records(), config.metric))
    return scores


def seen_rows(split: Split, config: Config, recorded: dict[str, str]) -> str:
    """How many of the split's texts the run was trained on, if its training file is still there as recorded."""
    path = data_file(ROOT / config.data_dir, "train")
    if path is None or recorded.get(path.name) != file_digest(path):
        return "Whether the run was trained on some of its texts is not known: its training file is not there."
    texts = {same_text(row.text) for row in read_rows(path, split.names)}
    return f"{sum(same_text(row.text) in texts for row in split.rows)} of its texts are also in the run's {path.name}."


def score_file(config: Config, file: Path) -> list[str]:
    """The scores of a run's best model on another labelled file, as Markdown; nothing is written."""
    path, device = run_path(config), pick_device()
    model, tokenizer, tuned = read_best(path, partial(load_best, config))
    split = make_split(read_rows(file, names := label_names(model.config)), names, tokenizer, config.max_length)
    dtype, recorded = autocast_dtype(config.amp, device), read_run(path)["environment"].get("data") or {}
    warn_of_use(path, dtype)
    logits = predict_logits(model.to(device), split, tokenizer, config, dtype)
    scores = {"thresholds": {"shared": tuned.shared, "per_label": dict(zip(names, tuned.per_label.tolist()))}}
    scores[file.name] = score_split(logits, split, tuned, loss=None)

    lines = [f"# {displayed(file)}, scored by {displayed(path)}", ""]
    lines += [f"{len(split)} rows. The epoch and the thresholds were chosen on the run's own validation rows."]
    uses = {"train": "trained on", "validation": "chosen by", "test": "scored on once already"}
    if same := [name for name, digest in recorded.items() if digest == file_digest(file)]:
        lines += [f"This is the run's own {same[0]}, the rows it was {uses[Path(same[0]).stem]}."]
    lines += [seen_rows(split, config, recorded), "", *table(*score_rows(scores))]
    return lines + details(file.name, scores) + worst_errors(split, probabilities(logits), tuned.per_label)


def load_best(config: Config, folder: Path) -> tuple[EmotionClassifier, PreTrainedTokenizerFast, Thresholds]:
    """All that is read of a best folder."""
    model = load_model(folder, config)
    return model, find_tokenizer(config, folder), read_thresholds(folder, label_names(model.config))


def main(config: Config, data: Path | None) -> None:
    if data:
        print("\n".join(score_file(config, data)))
        return
    path = run_path(config)
    dtype = autocast_dtype(config.amp, pick_device())
    best_folder(path)  # before the lock: where there is no run, none is made
    run = Run(path, None, {}, data=data_digests(config))
    tokenizer, shape = read_best(path, lambda folder: (find_tokenizer(config, folder), load_shape(folder)))
    splits = load_splits(config, tokenizer, label_names(shape))
    warn_of_use(path, dtype)
    evaluate_run(run, splits, tokenizer, config, dtype)
    run.close()
    print((path / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    settings = ("run_dir", "data_dir", "eval_batch_size", "num_workers", "amp")
    flag = {"type": Path, "help": "a labelled file to score, in the form of train.jsonl or a table; writes nothing"}
    sys.exit(run_script(main, __doc__, trained=True, shown=settings, data=flag))
