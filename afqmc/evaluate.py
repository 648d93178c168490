"""Score a run's best model on validation and, where there is one, on test; write report.md, .html and predictions/.

    python afqmc/evaluate.py --run_dir afqmc/runs/...
    python afqmc/evaluate.py --run_dir afqmc/runs/... --data my_pairs/more.csv    # any labelled file; writes nothing
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

from afqmc.cli import run_path, run_script
from afqmc.config import Config
from afqmc.dataset import (
    Split,
    data_digests,
    find_data,
    load_splits,
    make_loader,
    make_split,
    read_pairs,
    sorted_batches,
)
from afqmc.html_report import page
from afqmc.loss import class_weights, pair_loss
from afqmc.model import PairClassifier, find_tokenizer, load_model
from afqmc.report import WRITING, detail_tables, errors_table, report, score_table
from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.files import read_json, write_text
from common.checkpoint.identity import file_digest
from common.checkpoint.run import Run, best_folder, read_best, read_run, warn_of_use


def predict_logits(model: PairClassifier, split: Split, config: Config, dtype: torch.dtype | None) -> Tensor:
    """Logits (N, K) in fp32 on the CPU, in the order of the pairs; batches are sorted by length."""
    batches = sorted_batches(split.lengths, config.eval_batch_size)
    logits = torch.empty(len(split.pairs), len(model.names))
    device = next(model.parameters()).device
    model.eval()
    loader = make_loader(split, batches, config)
    bar = tqdm(loader, "evaluating", leave=False, disable=None, delay=5)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for rows, batch in zip(batches, bar):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            logits[rows] = model(**batch).cpu()
    return logits


def probabilities(logits: Tensor) -> np.ndarray:
    return logits.double().softmax(dim=1).numpy()  # (N, K)


def decide(probability: np.ndarray, threshold: float | None) -> np.ndarray:
    """(N, K) -> (N,) labels: of two the second where its probability is >= threshold, of more the most probable."""
    return probability.argmax(axis=1) if threshold is None else (probability[:, 1] >= threshold).astype(int)


def answers(probability: np.ndarray, threshold: float | None, names: tuple[str, ...]) -> list[dict]:
    """What is said of each row of (N, K): label and probability, of the second label where there are two.

    Of more the label's own, and probabilities: that of each by name.
    """
    rows = []
    for label, row in zip(decide(probability, threshold).tolist(), probability.tolist()):
        by_name = {name: round(p, 6) for name, p in zip(names, row)}
        if threshold is None:
            rows.append({"label": names[label], "probability": by_name[names[label]], "probabilities": by_name})
        else:
            rows.append({"label": names[label], "probability": by_name[names[1]]})
    return rows


def tune_threshold(probability: np.ndarray, labels: np.ndarray) -> float:
    """The threshold t whose rule "label 1 where probability >= t" has the best macro-F1 on these rows.

    Exact over all cuts between distinct probabilities; the middle of the best gap, and .5 where .5 lies in it. Of
    equally good gaps the one whose middle is nearest to .5.
    """
    # (N + 1,) for each number of rows taken as label 1, those of highest probability first
    order = np.argsort(-probability, kind="stable")
    ordered, n, positives = probability[order], len(labels), int(labels.sum())
    taken = np.arange(n + 1)
    true_positives = np.concatenate([[0], np.cumsum(labels[order])])
    true_negatives = (n - positives) - (taken - true_positives)
    f1_same = 2 * true_positives / np.maximum(taken + positives, 1)
    f1_different = 2 * true_negatives / np.maximum(2 * n - taken - positives, 1)

    # The gap between the last row taken and the first one not taken holds t; between equal rows there is none
    upper, lower = np.concatenate([[1.0], ordered]), np.concatenate([ordered, [0.0]])
    middle = (upper + lower) / 2
    middle = np.where(middle > lower, middle, upper)  # between neighbours of one rounding
    scores = np.where(upper > lower, f1_same + f1_different, -1.0)
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    best = best[np.abs(middle[best] - 0.5).argmin()]
    return 0.5 if lower[best] < 0.5 <= upper[best] else float(middle[best])


def score_split(
    logits: Tensor, split: Split, threshold: float | None, weights: Tensor | None, config: Config
) -> dict:
    """Mean loss, and the classification metrics at .5 and at the given threshold, or of the most probable label."""
    from common.metrics import classification_metrics

    probability = probabilities(logits)
    scores = {"loss": pair_loss(logits, split.labels, weights, config).mean().item()}
    cuts = {"most_probable": None} if threshold is None else {"at_half": 0.5, "at_threshold": threshold}
    for name, cut in cuts.items():
        scores[name] = classification_metrics(split.labels, decide(probability, cut), split.names)
    return scores


def validate(
    model: PairClassifier, split: Split, weights: Tensor | None, config: Config, dtype: torch.dtype | None
) -> dict:
    """Validation scores at .5, which choose the epoch, and, of two labels, the threshold that is best on these rows."""
    logits = predict_logits(model, split, config, dtype)
    if not torch.isfinite(logits).all():
        raise UserError("the validation logits are not finite; best/ is untouched. A lower learning_rate may help")
    is_binary = len(split.names) == 2
    threshold = tune_threshold(probabilities(logits)[:, 1], split.labels.numpy()) if is_binary else None
    scores = score_split(logits, split, threshold, weights, config)
    untuned = scores["at_half" if is_binary else "most_probable"]
    result = {"loss": scores["loss"], "f1_macro": untuned["f1_macro"], "accuracy": untuned["accuracy"]}
    tuned = {"threshold": threshold, "f1_macro_at_threshold": scores["at_threshold"]["f1_macro"]} if is_binary else {}
    return result | tuned


def load_best(config: Config, folder: Path) -> tuple[PairClassifier, PreTrainedTokenizerFast, float | None]:
    """Model, tokenizer and threshold of a best folder; None for more than two labels. Raises UserError."""
    model = load_model(folder)
    return model, find_tokenizer(config, folder), read_threshold(folder, model)


def read_threshold(folder: Path, model: PairClassifier) -> float | None:
    """The threshold that was tuned with the model in a best folder; None for more than two labels."""
    if len(model.names) > 2:
        return None
    threshold = read_json(folder / "threshold.json").get("threshold")
    if not isinstance(threshold, float) or not 0 <= threshold <= 1:
        raise UserError(f"{folder / 'threshold.json'}: threshold is {threshold!r}, expected a number from 0 to 1")
    return threshold


def evaluate_run(run: Run, splits: dict[str, Split], config: Config, dtype: torch.dtype | None) -> dict:
    """Scores of the best model on every split but train; writes predictions/, report.md and .html into the run."""
    model, _, threshold = read_best(run.path, partial(load_best, config))
    model.to(pick_device())
    weights = class_weights(config.class_weights, splits["train"])
    scores, errors = {"threshold": threshold, "test": None}, []
    (run.path / "predictions").mkdir(exist_ok=True)
    for name in [name for name in splits if name != "train"]:
        logits = predict_logits(model, splits[name], config, dtype)
        scores[name] = score_split(logits, splits[name], threshold, weights, config)
        errors, lines = worst_errors(splits[name], probabilities(logits), threshold), []
        for pair, answer in zip(splits[name].pairs, answers(probabilities(logits), threshold, model.names)):
            row = {"line": pair.line, "sentence1": pair.sentence1, "sentence2": pair.sentence2}
            row |= {"label": pair.label, "predicted": answer.pop("label")} | answer
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    text = report(scores, splits, errors, run.evaluations(), config)
    write_text(run.path / "report.md", text)
    write_text(run.path / "report.html", page(text, run.records(), config.metric))
    return scores


def worst_errors(split: Split, probability: np.ndarray, threshold: float | None) -> list[list]:
    """Of each wrong answer: line, sentences, label, answer, the label's probability, the lowest first."""
    decided, of_label = decide(probability, threshold), probability[range(len(split.pairs)), split.labels]
    wrong = [row for row in of_label.argsort(kind="stable").tolist() if decided[row] != split.labels[row]]
    named = [(split.pairs[row], split.names[decided[row]], float(of_label[row])) for row in wrong]
    return [[pair.line, *pair[:3], answer, p] for pair, answer, p in named]


def evaluate_file(config: Config, file: Path, dtype: torch.dtype | None) -> None:
    """Print what the run's best model and threshold score on any labelled file; nothing is written."""
    path = run_path(config)
    model, tokenizer, threshold = read_best(path, partial(load_best, config))
    warn_of_use(path, dtype)
    split = make_split(read_pairs(file, names=model.names), tokenizer, model.names)
    logits = predict_logits(model.to(pick_device()), split, config, dtype)
    scores = score_split(logits, split, threshold, None, config)

    # What it is to the run
    digests = read_run(path)["environment"].get("data") or {}
    lines = [f"# {file}: {len(split.pairs)} rows", ""]
    lines += [f"Scored by {path}, which chose its epoch and threshold on other rows; the loss is unweighted."]
    lines += [f"But this very file is its {name}." for name, there in digests.items() if there == file_digest(file)]
    try:
        train = find_data(config)["train"]
        if digests.get(train.name) != file_digest(train):
            raise UserError(f"{train} is not the run's")
        known = {pair.key for pair in read_pairs(train)}
        lines += [f"{sum(pair.key in known for pair in split.pairs)} of the rows also stand in {train}{WRITING}.", ""]
    except UserError as error:
        lines += [f"How many of the rows the run was trained on is not known: {error}", ""]
    lines += [*score_table({file.name: scores}, threshold), *detail_tables(file.name, scores, threshold)]
    print("\n".join(lines + errors_table(file.name, worst_errors(split, probabilities(logits), threshold))))


def main(config: Config, data: str = "") -> None:
    path, dtype = run_path(config), autocast_dtype(config.amp, pick_device())
    best_folder(path)  # where there is no run, none is made
    if data:
        return evaluate_file(config, Path(data), dtype)
    run = Run(path, None, {}, data=data_digests(config))
    tokenizer = read_best(path, partial(find_tokenizer, config))
    splits = load_splits(config, tokenizer)
    warn_of_use(path, dtype)
    evaluate_run(run, splits, config, dtype)
    run.close()
    print((path / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    flag = {"default": "", "help": "score this labelled file (JSON lines, .csv or .tsv) and write nothing"}
    shown = ("run_dir", "data_dir", "eval_batch_size", "num_workers", "amp")
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, data=flag))
