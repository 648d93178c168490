"""Score a run's best model on validation and test; write report.md and predictions/.

    python evidence_spans/evaluate.py --run_dir evidence_spans/runs/...
    python evidence_spans/evaluate.py --run_dir evidence_spans/runs/... --split val --metrics_output val.json

With --split only that split is scored, its table printed, and nothing in the run is written. --metrics_output and
--predictions_output name files of your own: all scores as JSON, and one JSON line for each example with its n best.
"""

import json
import math
import sys
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import Run, RunError, begun_in, best_folder, read_json, write_json, write_text
from common.metrics import answer_scores, multi_span_metrics, normalize_answer, span_metrics, token_metrics
from evidence_spans.config import Config, UserError, run_path, run_script, saved_config
from evidence_spans.dataset import Example, fingerprint, load_splits
from evidence_spans.model import (
    MODEL_INPUTS,
    SpanModel,
    autocast_dtype,
    load_model,
    load_tokenizer,
    pick_device,
    span_loss,
)
from evidence_spans.postprocess import (
    Decoding,
    Prediction,
    answer,
    apart,
    best_pairs,
    calibrate,
    merge_windows,
    no_answer_probability,
    probabilities,
    sentence_pairs,
    sentences,
    several_answers,
    tune_span_threshold,
    tune_threshold,
    window_predictions,
)
from evidence_spans.report import report, score_table
from evidence_spans.windows import Window, make_loader, make_windows, sorted_batches, window_ranges


def predict(
    model: SpanModel,
    examples: list[Example],
    windows: list[Window],
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    max_answer_length: int,
    device: torch.device,
) -> tuple[list[Prediction], float]:
    """The n best spans of each example, in their order, and the loss averaged over windows."""
    batches = sorted_batches(np.array([len(window.input_ids) for window in windows]), config.eval_batch_size)
    dtype = autocast_dtype(config.amp, device)
    whole = {}  # the sentences of each post
    if config.decode == "sentence":
        whole = {context: sentences(context) for context in {example.context for example in examples}}
    model.eval()
    found: list[Prediction | None] = [None] * len(windows)
    loss = 0.0
    bar = tqdm(make_loader(windows, batches, tokenizer, config), leave=False, disable=None, desc="evaluating")
    with torch.inference_mode():
        for rows, batch in zip(batches, bar):
            batch = {name: tensor.to(device, non_blocking=config.non_blocking) for name, tensor in batch.items()}
            inputs = {name: tensor for name, tensor in batch.items() if name in MODEL_INPUTS}
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                start, end = model(**inputs)
            loss += span_loss(start, end, batch).sum().item()
            some = [windows[row] for row in rows]
            if config.decode == "sentence":
                spans = [whole[examples[window.example].context] for window in some]
                pairs = sentence_pairs(start, end, some, spans, config.n_best_size)
            else:
                pairs = best_pairs(start, end, batch["context_mask"], config.n_best_size, max_answer_length)
            for row, prediction in zip(rows, window_predictions(some, start[:, 0] + end[:, 0], *pairs)):
                found[row] = prediction
    ranges = window_ranges(windows, len(examples)).tolist()
    merged = [merge_windows(found[first:end], config.n_best_size) for first, end in pairwise(ranges)]
    return merged, loss / len(windows)


def answer_texts(examples: list[Example], predictions: list[Prediction], threshold: float | None) -> list[str]:
    """The text of each best span, "" for no answer."""
    spans = [answer(prediction, threshold) for prediction in predictions]
    return [example.context[span.start : span.end] if span else "" for example, span in zip(examples, spans)]


def tune(
    predictions: list[Prediction],
    examples: list[Example],
    max_answer_length: int,
    questions: dict[str, str],
    config: Config,
) -> Decoding:
    """The thresholds that are best on these examples, and the probability of no answer fitted to them."""
    golds = [example.texts for example in examples]
    unanswerable = np.array([not gold for gold in golds])
    differences = np.array([prediction.difference for prediction in predictions])
    threshold = None
    if unanswerable.any():
        texts = answer_texts(examples, predictions, None)
        column = int(config.metric != "exact_match")
        if_answered = np.array([answer_scores(*pair)[column] for pair in zip(texts, golds)])
        weights = np.ones(len(examples))
        if config.metric == "f1_balanced":
            weights = np.where(unanswerable, 1 / unanswerable.sum(), 1 / max((~unanswerable).sum(), 1))
        threshold = tune_threshold(differences, weights * if_answered, weights * unanswerable)
    span_threshold = tune_several(predictions, examples) if any(example.together for example in examples) else None
    return Decoding(max_answer_length, threshold, span_threshold, *calibrate(differences, unanswerable), questions)


def tune_several(predictions: list[Prediction], examples: list[Example]) -> float:
    """The span threshold with the best multi_span_metrics: texts that are equal there count once here too."""
    spans, wanted = [], 0
    for example, prediction in zip(examples, predictions):
        golds = {tuple(normalize_answer(text)) for text in example.texts}
        found = {}
        for span in apart(prediction):
            words = tuple(normalize_answer(example.context[span.start : span.end]))
            found.setdefault(words, prediction.null_score - span.score)
        spans += [(difference, words in golds) for words, difference in found.items()]
        wanted += len(golds)
    return tune_span_threshold(spans, wanted)


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
        found = [[(span.start, span.end)] if span else [] for span in spans]
        scores[name]["tokens"] = token_metrics(contexts, found, places)
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


def answer_row(name: object, context: str, prediction: Prediction, decoding: Decoding) -> dict:
    """What is said about one example: answer, its offsets, its probability, that of no answer, several answers."""
    with_null = decoding.threshold is not None
    shares = probabilities(prediction, with_null)
    span = answer(prediction, decoding.threshold)
    if span:
        row = {"id": name, "answer": context[span.start : span.end], "start": span.start, "end": span.end}
        row["probability"] = round(shares[with_null], 6)
    else:
        row = {"id": name, "answer": "", "start": None, "end": None, "probability": round((shares or [1.0])[0], 6)}
    row["difference"] = round(prediction.difference, 6) if prediction.scores else None
    p = no_answer_probability(prediction, decoding)
    row["no_answer_probability"] = None if p is None else round(p, 6)
    row["answers"] = [
        {"text": context[s.start : s.end], "start": s.start, "end": s.end}
        for s in several_answers(prediction, decoding)
    ]
    return row


def n_best(context: str, prediction: Prediction, decoding: Decoding) -> list[dict]:
    """The n best spans with probabilities that sum to 1, best first; no answer, the empty one, is among them."""
    with_null = decoding.threshold is not None
    shares = probabilities(prediction, with_null)
    rows = [
        {"text": context[start:end], "start": start, "end": end, "probability": share}
        for start, end, share in zip(prediction.starts, prediction.ends, shares[with_null:])
    ]
    if with_null:  # after the spans that are at least as probable
        place = sum(share >= shares[0] for share in shares[1:])
        rows.insert(place, {"text": "", "start": None, "end": None, "probability": shares[0]})
    return rows


def evaluate_split(
    model: SpanModel,
    examples: list[Example],
    windows: list[Window],
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    decoding: Decoding,
    device: torch.device,
) -> tuple[dict, list[Prediction]]:
    predictions, loss = predict(model, examples, windows, tokenizer, config, decoding.max_answer_length, device)
    return score_split(predictions, examples, loss, decoding), predictions


def prediction_lines(
    examples: list[Example], predictions: list[Prediction], decoding: Decoding, split: str, with_n_best: bool
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


def evaluate_run(
    run: Run,
    splits: dict[str, list[Example]],
    windows: dict[str, list[Window]],
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    device: torch.device,
) -> tuple[dict, str]:
    """Scores of the best model on validation and test, and its predictions with n best; writes the run's report."""
    folder = best_folder(run.path)
    model, decoding = load_model(folder, config).to(device), read_decoding(folder)
    scores: dict = {"decoding": asdict(decoding)}
    history = [record for record in run.history() if record["event"] == "evaluation"]
    (run.path / "predictions").mkdir(exist_ok=True)
    lines = []
    for name in ("validation", "test"):
        scores[name], found = evaluate_split(
            model, splits[name], windows[name], tokenizer, config, decoding, device
        )
        text = prediction_lines(splits[name], found, decoding, name, with_n_best=False)
        write_text(run.path / "predictions" / f"{name}_predictions.jsonl", text)
        lines.append(prediction_lines(splits[name], found, decoding, name, with_n_best=True))
    write_text(run.path / "report.md", report(scores, history, config))
    return scores, "".join(lines)


def read_decoding(folder: Path) -> Decoding:
    """How the model of a best folder turns logits into text. Raises RunError."""
    path = folder / "decoding.json"
    saved = read_json(path)
    kinds = dict.fromkeys(("threshold", "span_threshold", "slope", "intercept"), (float, type(None)))
    for name, kind in (kinds | {"max_answer_length": int, "questions": dict}).items():
        value = saved.get(name, "missing")
        odd = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
        if odd or not isinstance(value, kind):
            raise RunError(f"{path}: {name} is {value!r}, which no run writes")
    decoding = Decoding(**{field.name: saved[field.name] for field in fields(Decoding)})
    texts = all(isinstance(question, str) for question in decoding.questions.values())
    if decoding.max_answer_length < 1 or (decoding.slope is None) != (decoding.intercept is None) or not texts:
        raise RunError(f"{path} holds values that no run writes")
    return decoding


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
    splits, _ = load_splits(config)
    run = Run(path, saved_config(path / "config.json"), {})
    folder = best_folder(path)  # again: a run that was killed in the middle of a swap is mended when it is opened
    tokenizer = load_tokenizer(config, folder)
    check_data(run, splits, config)
    say_precision(path, config, device)
    if run.results is None:
        print("the run is not finished: this is its best epoch so far", file=sys.stderr)
    names = {"all": ["validation", "test"], "val": ["validation"]}.get(split, [split])
    windows = {name: make_windows(splits[name], tokenizer, config) for name in names}
    if split == "all":
        scores, lines = evaluate_run(run, splits, windows, tokenizer, config, device)
        print((path / "report.md").read_text(encoding="utf-8"))
    else:
        name, decoding = names[0], read_decoding(folder)
        model = load_model(folder, config).to(device)
        found, predictions = evaluate_split(
            model, splits[name], windows[name], tokenizer, config, decoding, device
        )
        scores = {"decoding": asdict(decoding), name: found}
        lines = prediction_lines(splits[name], predictions, decoding, name, with_n_best=True)
        print("\n".join(score_table(scores, [name])))
    run.close()
    if metrics_output:
        write_json(Path(metrics_output), scores)
    if predictions_output:
        write_text(Path(predictions_output), lines)


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
