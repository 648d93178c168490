"""Score a run's best model on validation and, where there is one, on test; write report.md and predictions/.

    python afqmc/evaluate.py --run_dir afqmc/runs/...
"""

import json
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from afqmc.config import Config, run_path, run_script, saved_config
from afqmc.dataset import (
    LABELS,
    Pair,
    fingerprint,
    load_splits,
    make_loader,
    repeated_in_test,
    sorted_batches,
    token_lengths,
)
from afqmc.eda import table
from afqmc.model import (
    PairClassifier,
    autocast_dtype,
    class_weights,
    load_model,
    load_tokenizer,
    pair_loss,
    pick_device,
)
from common.checkpoint import Run, RunError, begun_in, best_folder, read_json, write_text
from common.metrics import classification_metrics


def predict_logits(
    model: PairClassifier, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, config: Config, device: torch.device
) -> torch.Tensor:
    """Logits (N, 2) in fp32 on the CPU, in the order of pairs; batches are sorted by length."""
    batches = sorted_batches(token_lengths(pairs, tokenizer), config.eval_batch_size)
    logits = torch.empty(len(pairs), len(LABELS))
    dtype = autocast_dtype(config.amp, device)
    model.eval()
    bar = tqdm(make_loader(pairs, batches, tokenizer, config), leave=False, disable=None, desc="evaluating")
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for rows, batch in zip(batches, bar):
            batch.pop("labels", None)
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            logits[rows] = model(model.embed(batch.pop("input_ids")), **batch).cpu()
    return logits


def probabilities(logits: torch.Tensor) -> np.ndarray:
    """(N, 2) logits -> (N,) probability of label 1, "the same"."""
    return logits.double().softmax(dim=1)[:, 1].numpy()


def tune_threshold(probability: np.ndarray, labels: np.ndarray) -> float:
    """The threshold t whose rule "label 1 where probability >= t" has the best macro-F1 on these rows.

    Exact over all cuts between distinct probabilities; the middle of the best gap, and .5 where .5 lies in it. Of
    equally good gaps the one whose middle is nearest to .5.
    """
    order = np.argsort(-probability, kind="stable")
    ordered, n, positives = probability[order], len(labels), int(labels.sum())
    taken = np.arange(n + 1)  # predicted as 1: the taken rows of highest probability
    true_positives = np.concatenate([[0], np.cumsum(labels[order])])
    true_negatives = (n - positives) - (taken - true_positives)
    f1_same = 2 * true_positives / np.maximum(taken + positives, 1)
    f1_different = 2 * true_negatives / np.maximum(2 * n - taken - positives, 1)
    upper, lower = np.concatenate([[1.0], ordered]), np.concatenate([ordered, [0.0]])  # the gap that holds t
    middle = (upper + lower) / 2
    middle = np.where(middle > lower, middle, upper)  # between neighbours of one rounding
    scores = np.where(upper > lower, f1_same + f1_different, -1.0)
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    best = best[np.abs(middle[best] - 0.5).argmin()]
    return 0.5 if lower[best] < 0.5 <= upper[best] else float(middle[best])


def score_split(
    logits: torch.Tensor, pairs: list[Pair], threshold: float, weights: torch.Tensor | None, config: Config
) -> dict:
    """Mean loss, and the classification metrics at .5 and at the given threshold."""
    labels = torch.tensor([pair.label for pair in pairs])
    probability = probabilities(logits)
    return {
        "loss": pair_loss(logits, labels, weights, config).mean().item(),
        "at_half": classification_metrics(labels, probability >= 0.5, LABELS),
        "at_threshold": classification_metrics(labels, probability >= threshold, LABELS),
    }


def evaluate_run(
    run: Run, splits: dict[str, list[Pair]], tokenizer: PreTrainedTokenizerFast, config: Config, device: torch.device
) -> dict:
    """Scores of the best model on every split but train; writes predictions/ and report.md into the run."""
    folder = best_folder(run.path)
    model = load_model(folder).to(device)
    threshold = read_threshold(folder)
    weights = class_weights(config.class_weights, [pair.label for pair in splits["train"]])
    scores: dict = {"threshold": threshold}
    history = [record for record in run.history() if record["event"] == "evaluation"]
    (run.path / "predictions").mkdir(exist_ok=True)
    for name in [name for name in splits if name != "train"]:
        logits = predict_logits(model, splits[name], tokenizer, config, device)
        scores[name] = score_split(logits, splits[name], threshold, weights, config)
        lines = []
        for pair, probability in zip(splits[name], probabilities(logits).tolist()):
            row = {"line": pair.line, "sentence1": pair.sentence1, "sentence2": pair.sentence2}
            row |= {"label": LABELS[pair.label], "predicted": LABELS[probability >= threshold]}
            lines.append(json.dumps(row | {"probability": round(probability, 6)}, ensure_ascii=False) + "\n")
        write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    truncated = float((token_lengths(splits["train"], tokenizer) > config.max_length).mean())
    write_text(run.path / "report.md", report(scores, splits, history, truncated, config))
    return scores


def read_threshold(folder: Path) -> float:
    """The threshold that was tuned with the model in a best folder."""
    threshold = read_json(folder / "threshold.json").get("threshold")
    if not isinstance(threshold, float) or not 0 <= threshold <= 1:
        raise RunError(f"{folder / 'threshold.json'}: threshold is {threshold!r}, expected a number from 0 to 1")
    return threshold


def check_data(run: Run, splits: dict[str, list[Pair]], config: Config) -> None:
    """Refuse to go on with, or to score, other rows than a run began with: training rows could become test rows."""
    if run.environment.get("data_sha256") != fingerprint(splits):
        raise RunError(f"{config.data_dir} does not hold the rows that {run.path} was begun with: bring them back")


def say_precision(path: Path, config: Config, device: torch.device) -> None:
    """Tell where this machine or --amp computes in another type than the run was trained in."""
    trained = begun_in(path).get("autocast")
    if trained != str(now := autocast_dtype(config.amp, device)):
        print(f"trained with autocast {trained}, now {now}: scores can differ from the run's own", file=sys.stderr)


def report(scores: dict, splits: dict[str, list[Pair]], history: list[dict], truncated: float, config: Config) -> str:
    """The readable evaluation; its detail is of the test split, or of validation where there is no test.

    history: the evaluations of metrics.jsonl. truncated: the share of training pairs that max_length cuts.
    """
    threshold, detail = scores["threshold"], "test" if "test" in scores else "validation"
    names = [name for name in splits if name != "train"]
    lines = [f"# {config.model} on {config.data_dir}", ""]
    lines += ["The epoch and the tuned threshold were chosen on validation, so its own row at that threshold flatters."]
    if detail == "test":
        seen = f"{repeated_in_test(splits)} of its {len(splits['test'])} pairs"
        lines += [f"Nothing was chosen on test; {seen} are also in train.json.", ""]
    else:
        lines += ["There is no test split (no dev.json): no figure below is an unbiased estimate.", ""]
    columns = ["f1_macro", "accuracy", "f1_weighted"]
    rows = [
        [name, label, *(scores[name][key][column] for column in columns), scores[name]["loss"]]
        for name in names
        for label, key in (("0.5", "at_half"), (f"{threshold:.4f}, tuned on validation", "at_threshold"))
    ]
    lines += table(["split", "threshold", *columns, "loss"], rows)
    for label, key in [("0.5", "at_half"), (f"{threshold:.4f}", "at_threshold")][: 1 if threshold == 0.5 else 2]:
        lines += [f"## {detail}, threshold {label}", "", *class_tables(scores[detail][key])]
    columns = ["epoch", "step", "train_loss", "loss", "f1_macro", "accuracy"]
    lines += ["## Epochs (validation)", "", *table(columns, [[r[c] for c in columns] for r in history])]
    lines += ["## Hints", "", *(f"- {hint}" for hint in hints(scores, history, truncated, config)), ""]
    return "\n".join(lines)


def class_tables(metrics: dict) -> list[str]:
    """Per-class scores, the confusion matrix with row recall and column precision, and the kinds of mistake."""
    columns = ["precision", "recall", "f1", "support"]
    per_class = metrics["per_class"]
    lines = table(["label", *columns], [[name, *(per_class[name][c] for c in columns)] for name in LABELS])
    matrix = metrics["confusion_matrix"]
    rows = [[f"true {name}", *matrix[i], per_class[name]["recall"]] for i, name in enumerate(LABELS)]
    rows.append(["precision", *(per_class[name]["precision"] for name in LABELS), ""])
    lines += table(["", *(f"predicted {name}" for name in LABELS), "recall"], rows)
    (_, false_positives), (false_negatives, _) = matrix
    shares = f"{false_positives / metrics['rows']:.1%}) and {false_negatives} false negatives ("
    lines += [f"{false_positives} false positives ({shares}{false_negatives / metrics['rows']:.1%}) of all rows.", ""]
    return lines


def hints(scores: dict, history: list[dict], truncated: float, config: Config) -> list[str]:
    """What training and validation suggest to try next, never test; each hint holds the figures that brought it up."""
    found = []
    (_, false_positives), (false_negatives, _) = scores["validation"]["at_half"]["confusion_matrix"]
    for more, less, names, direction in (
        (false_positives, false_negatives, ("false positives", "negatives"), "higher"),
        (false_negatives, false_positives, ("false negatives", "positives"), "lower"),
    ):
        if more > less and (more - less) ** 2 > 4 * (more + less):  # two standard deviations (McNemar's statistic)
            tuned = scores["threshold"]
            found.append(
                f"At .5 validation has more {names[0]} ({more}) than {names[1]} ({less}): a {direction} threshold "
                f"balances them; the one tuned there for macro-F1 is {tuned:.4f}."
            )
    if truncated > 0.01:
        found.append(f"{truncated:.1%} of the training pairs are longer than max_length {config.max_length}.")
    if not history:  # stopped before the first evaluation was saved
        return found or ["Nothing stands out."]
    best = (min if config.metric == "loss" else max)(history, key=lambda record: record[config.metric])
    lowest, last = min(history, key=lambda record: record["loss"]), history[-1]
    if len(history) > 1 and best is last:
        found.append(f"The last epoch ({last['epoch']}) was the best: more epochs may help.")
    if last["loss"] > 1.2 * lowest["loss"] and last["train_loss"] < lowest["train_loss"]:
        found.append(
            f"Since epoch {lowest['epoch']} the validation loss rose from {lowest['loss']:.4f} to {last['loss']:.4f} "
            f"while the training loss fell from {lowest['train_loss']:.4f} to {last['train_loss']:.4f}: overfitting; "
            "fewer epochs, more dropout, label smoothing or FGM may help."
        )
    if (highest := max(record["f1_macro"] for record in history)) < 0.5:
        found.append(f"Macro-F1 stays at {highest:.4f}, little more than one label for all: try another learning rate.")
    return found or ["Nothing stands out."]


def main(config: Config) -> None:
    path, device = run_path(config), pick_device()
    tokenizer = load_tokenizer(config, best_folder(path))  # before the lock: where there is no run, none is made
    splits = load_splits(config)
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
