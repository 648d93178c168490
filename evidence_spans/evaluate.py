"""Score a run's best model on validation and test; write report.md and predictions/.

    python evidence_spans/evaluate.py --run_dir evidence_spans/runs/...
    python evidence_spans/evaluate.py --run_dir evidence_spans/runs/... --split val --metrics_output val.json

With --split only that split is scored, its table printed, and nothing in the run is written. --metrics_output and
--predictions_output name files of your own: all scores as JSON, and one JSON line for each example with its n best.
"""

import json
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import Run, RunError, begun_in, best_folder, write_json, write_text
from common.metrics import multi_span_metrics, span_metrics, token_metrics
from evidence_spans.answers import (
    Decoding,
    answer,
    answer_row,
    n_best,
    no_answer_probability,
    read_decoding,
    several_answers,
)
from evidence_spans.config import Config, UserError, run_path, run_script, saved_config
from evidence_spans.dataset import Split, fingerprint, load_splits, make_loader, sorted_batches, tokenize
from evidence_spans.formats import Example
from evidence_spans.loss import span_loss
from evidence_spans.model import MODEL_INPUTS, SpanModel, autocast_dtype, load_model, load_tokenizer, pick_device
from evidence_spans.postprocess import (
    Prediction,
    best_pairs,
    merge_windows,
    sentence_pairs,
    sentences,
    window_predictions,
)
from evidence_spans.report import report, score_table
from evidence_spans.thresholds import answer_texts


def predict(
    model: SpanModel, split: Split, tokenizer: PreTrainedTokenizerFast, config: Config, max_answer_length: int
) -> tuple[list[Prediction], float]:
    """The n best spans of each example, in their order, and the loss averaged over windows."""
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.amp, device)
    batches = sorted_batches(split.lengths, config.eval_batch_size)
    bar = tqdm(make_loader(split.windows, batches, tokenizer, config), leave=False, disable=None, desc="evaluating")
    sentences_of = {}  # by post
    if config.decode == "sentence":
        sentences_of = {context: sentences(context) for context in {example.context for example in split.examples}}

    model.eval()
    parts: list[Prediction | None] = [None] * len(split.windows)
    loss = 0.0
    with torch.inference_mode():
        for rows, batch in zip(batches, bar):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            inputs = {name: tensor for name, tensor in batch.items() if name in MODEL_INPUTS}
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                start, end = model(**inputs)
            loss += span_loss(start, end, batch).sum().item()

            windows = [split.windows[row] for row in rows]
            if config.decode == "sentence":
                spans = [sentences_of[split.examples[window.example].context] for window in windows]
                pairs = sentence_pairs(start, end, windows, spans, config.n_best_size)
            else:
                pairs = best_pairs(start, end, batch["context_mask"], config.n_best_size, max_answer_length)
            for row, part in zip(rows, window_predictions(windows, start[:, 0] + end[:, 0], *pairs)):
                parts[row] = part

    starts = np.searchsorted(split.owners, np.arange(len(split.examples) + 1)).tolist()  # each example's windows
    merged = [merge_windows(parts[first:end], config.n_best_size) for first, end in pairwise(starts)]
    return merged, loss / len(split.windows)


def score_split(predictions: list[Prediction], examples: list[Example], loss: float, decoding: Decoding) -> dict:
    """Loss, and the scores of the tuned threshold, of threshold 0, and of "no answer" everywhere.

    Where nothing is unanswerable in validation there is no threshold, and an answer is never empty.
    """
    golds = [example.texts for example in examples]
    contexts = [example.context for example in examples]
    places = [[list(e.answers)] if e.together else [[span] for span in e.answers] for e in examples]
    scores: dict = {"loss": loss, "all_empty": span_metrics([""] * len(examples), golds)}
    rules = {"at_threshold": decoding.threshold} | ({} if decoding.threshold is None else {"at_zero": 0.0})
    for name, threshold in rules.items():
        scores[name] = span_metrics(answer_texts(examples, predictions, threshold), golds)
        spans = [answer(prediction, threshold) for prediction in predictions]
        scores[name]["tokens"] = token_metrics(contexts, [[span[:2]] if span else [] for span in spans], places)

    if any(example.together for example in examples):
        several = [several_answers(prediction, decoding) for prediction in predictions]
        texts = [[context[s.start : s.end] for s in spans] for context, spans in zip(contexts, several)]
        scores["several"] = {"all": multi_span_metrics(texts, golds)}
        scores["several"]["tokens"] = token_metrics(contexts, [[s[:2] for s in spans] for spans in several], places)
        if many := [row for row, gold in enumerate(golds) if len(gold) > 1]:
            chosen = [[part[row] for row in many] for part in (texts, golds)]
            scores["several"]["posts_with_several"] = multi_span_metrics(*chosen) | {"rows": len(many)}
    if decoding.slope is not None:
        p = np.array([no_answer_probability(prediction, decoding) for prediction in predictions])
        scores["no_answer_brier"] = float(np.mean((p - np.array([not gold for gold in golds])) ** 2))
    return scores


def evaluate(
    folder: Path, splits: dict[str, Split], tokenizer: PreTrainedTokenizerFast, config: Config, device: torch.device
) -> tuple[dict, dict[str, list[Prediction]]]:
    """Scores and predictions of a best folder's model on each split."""
    model, decoding = load_model(folder, config).to(device), read_decoding(folder)
    scores, predictions = {"decoding": asdict(decoding)}, {}
    for name, split in splits.items():
        predictions[name], loss = predict(model, split, tokenizer, config, decoding.max_answer_length)
        scores[name] = score_split(predictions[name], split.examples, loss, decoding)
    return scores, predictions


def prediction_lines(
    split: str, examples: list[Example], predictions: list[Prediction], decoding: Decoding, with_n_best: bool = False
) -> str:
    """One JSON line for each example, its gold answers beside the prediction."""
    lines = []
    for example, prediction in zip(examples, predictions):
        row = answer_row(example.id, example.context, prediction, decoding)
        row |= {"post": example.post, "question": example.question, "gold": example.texts, "split": split}
        if with_n_best:
            row["n_best"] = n_best(example.context, prediction, decoding)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def write_report(run: Run, splits: dict[str, Split], scores: dict, predictions: dict, config: Config) -> None:
    """report.md and predictions/ of a run."""
    (run.path / "predictions").mkdir(exist_ok=True)
    for name, split in splits.items():
        lines = prediction_lines(name, split.examples, predictions[name], Decoding(**scores["decoding"]))
        write_text(run.path / "predictions" / f"{name}_predictions.jsonl", lines)
    history = [record for record in run.history() if record["event"] == "evaluation"]
    write_text(run.path / "report.md", report(scores, history, config))


def check_data(run: Run, splits: dict[str, list[Example]], config: Config) -> None:
    """Refuse to go on with, or to score, other rows than a run began with: training rows could become test rows."""
    if run.environment.get("data_sha256") != fingerprint(splits):
        raise RunError(f"{config.data_dir} does not hold the rows that {run.path} was begun with: bring them back")


def say_precision(path: Path, config: Config, device: torch.device) -> None:
    """Tell where this machine or --amp computes in another type than the run was trained in."""
    trained = begun_in(path).get("autocast")
    if trained != str(now := autocast_dtype(config.amp, device)):
        print(f"trained with autocast {trained}, now {now}: scores can differ from the run's own", file=sys.stderr)


def main(
    config: Config,
    split: Literal["all", "val", "validation", "test"] = "all",
    metrics_output: str = "",
    predictions_output: str = "",
) -> None:
    path, device = run_path(config), pick_device()
    for output in filter(None, (metrics_output, predictions_output)):
        if not Path(output).absolute().parent.is_dir():
            raise UserError(f"{output}: there is no such folder")
    best_folder(path)  # before the lock: where there is no run, none is made
    examples, _ = load_splits(config)
    run = Run(path, saved_config(path / "config.json"), {})
    folder = best_folder(path)  # again: a run that was killed in the middle of a swap is mended when it is opened
    tokenizer = load_tokenizer(config, folder)
    check_data(run, examples, config)
    say_precision(path, config, device)
    if run.results is None:
        print("the run is not finished: this is its best epoch so far", file=sys.stderr)

    names = {"all": ["validation", "test"], "val": ["validation"]}.get(split, [split])
    splits = {name: tokenize(examples[name], tokenizer, config) for name in names}
    scores, predictions = evaluate(folder, splits, tokenizer, config, device)
    if split == "all":
        write_report(run, splits, scores, predictions, config)
        print((path / "report.md").read_text(encoding="utf-8"))
    else:
        print("\n".join(score_table(scores, names)))
    run.close()
    if metrics_output:
        write_json(Path(metrics_output), scores)
    if predictions_output:
        decoding = Decoding(**scores["decoding"])
        lines = [prediction_lines(name, examples[name], predictions[name], decoding, True) for name in names]
        write_text(Path(predictions_output), "".join(lines))


if __name__ == "__main__":
    flags = {
        "split": {
            "choices": ["all", "val", "validation", "test"],
            "default": "all",
            "help": "which split; all writes the report",
        },
        "metrics_output": {"default": "", "help": "JSON file for all scores"},
        "predictions_output": {"default": "", "help": "JSON-lines file for all predictions with their n best"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
