"""Score a run's best model on validation and test; write report.md and predictions/.

    python evidence_spans/evaluate.py --run_dir evidence_spans/runs/...
    python evidence_spans/evaluate.py --run_dir evidence_spans/runs/... --split val --metrics_output val.json

With --split only that split is scored, its table printed, and nothing in the run is written; with --data the same of a
labelled file that the run need not know, and its worst errors are printed too.
"""

import json
import math
import sys
from dataclasses import asdict
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.files import write_json, write_text
from common.checkpoint.run import Run, best_folder, read_best, read_run, warn_of_use
from common.checkpoint.texts import same_text
from evidence_spans.answers import Decoding, answer, answer_row, no_answer_probability, several_answers
from evidence_spans.cli import FREE, displayed, run_path, run_script
from evidence_spans.config import Config
from evidence_spans.dataset import (
    Split,
    data_digests,
    find_cautions,
    load_examples,
    make_loader,
    make_split,
    read_source,
    sorted_batches,
)
from evidence_spans.errors import error_lines, error_page, worst_errors
from evidence_spans.formats import Example
from evidence_spans.html_report import page
from evidence_spans.loss import span_loss
from evidence_spans.model import MODEL_INPUTS, SpanModel, find_tokenizer, load_model
from evidence_spans.postprocess import Prediction, best_spans, merge_windows, sentences
from evidence_spans.report import find_low_scores, report, score_lines
from evidence_spans.thresholds import answer_texts, tune
from evidence_spans.windows import UnfitSettings

SPLITS = {"all": ("validation", "test"), "val": ("validation",), "validation": ("validation",), "test": ("test",)}


def predict(
    model: SpanModel,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    max_answer_length: int,
    config: Config,
    dtype: torch.dtype | None,
) -> tuple[list[Prediction], float]:
    """The n best spans of each example, in their order, and the loss averaged over windows."""
    batches = sorted_batches(split.lengths, config.eval_batch_size)
    device = next(model.parameters()).device
    model.eval()
    parts: list[Prediction | None] = [None] * len(split.windows)
    sentences_of = cache(lambda context: np.array(sentences(context), dtype=int).reshape(-1, 2))  # (S, 2)
    loss = 0.0
    bar = tqdm(make_loader(split.windows, batches, tokenizer, config), leave=False, disable=None, desc="evaluating")
    with torch.inference_mode():
        for rows, batch in zip(batches, bar):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                start, end = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
            loss += span_loss(start, end, batch).sum().item()

            windows, found = [split.windows[row] for row in rows], None
            if config.decode == "sentence":
                found = [sentences_of(split.examples[window.example].context) for window in windows]
            spans = best_spans(windows, start, end, batch["context_mask"], config.n_best_size, max_answer_length, found)
            for row, part in zip(rows, spans):
                parts[row] = part

    starts = np.searchsorted(split.owners, np.arange(len(split.examples) + 1)).tolist()  # each example's windows
    merged = [merge_windows(parts[first:end], config.n_best_size) for first, end in pairwise(starts)]
    return merged, loss / len(split.windows)


def score_split(predictions: list[Prediction], examples: list[Example], loss: float, decoding: Decoding) -> dict:
    """Loss, and the scores of the tuned threshold, of threshold 0, and of "no answer" everywhere.

    Where nothing is unanswerable in validation there is no threshold, and an answer is never empty.
    """
    from common.metrics import multi_span_metrics, span_metrics, token_metrics

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
        spans = [[span[:2] for span in several_answers(prediction, decoding)] for prediction in predictions]
        texts = [[context[start:end] for start, end in some] for context, some in zip(contexts, spans)]
        scores["several"] = {"all": multi_span_metrics(texts, golds)}
        scores["several"]["tokens"] = token_metrics(contexts, spans, places)
        if many := [row for row, gold in enumerate(golds) if len(gold) > 1]:
            chosen = [[part[row] for row in many] for part in (texts, golds)]
            scores["several"]["posts_with_several"] = multi_span_metrics(*chosen) | {"rows": len(many)}
    if decoding.slope is not None:
        p = np.array([no_answer_probability(prediction, decoding) for prediction in predictions])
        scores["no_answer_brier"] = float(np.mean((p - np.array([not gold for gold in golds])) ** 2))
    return scores


def validate(
    model: SpanModel,
    split: Split,
    tokenizer: PreTrainedTokenizerFast,
    untuned: Decoding,
    config: Config,
    dtype: torch.dtype | None,
) -> tuple[dict, Decoding]:
    """Validation scores at the threshold that is best on these examples, and what was tuned on them."""
    predictions, loss = predict(model, split, tokenizer, untuned.max_answer_length, config, dtype)
    if not math.isfinite(loss):
        raise UnfitSettings("the validation loss is not finite; best/ is untouched. A lower learning_rate may help")
    decoding = tune(predictions, split.examples, untuned, config)
    scores = score_split(predictions, split.examples, loss, decoding)["at_threshold"]
    at_threshold = {name: scores[name] for name in ("f1", "exact_match", "f1_balanced")}
    return {"loss": loss, **at_threshold, "f1_has_answer": scores["has_answer"]["f1"]}, decoding


def load_best(path: Path, config: Config) -> tuple[PreTrainedTokenizerFast, SpanModel, Decoding]:
    """All that a run's best folder holds, of one epoch. Raises UserError."""
    return read_best(path, lambda folder: (find_tokenizer(config, folder), *load_model(folder, config)))


def write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def score_splits(
    splits: dict[str, Split],
    best: tuple[PreTrainedTokenizerFast, SpanModel, Decoding],
    cautions: list[str],
    config: Config,
    dtype: torch.dtype | None,
) -> tuple[dict, dict[str, list[dict]]]:
    """Scores of a best model, as load_best gives it, on the given splits but train, and of each a row an example."""
    tokenizer, model, decoding = best
    model.to(pick_device())
    scores, rows = {"decoding": asdict(decoding)}, {}
    for name in (name for name in splits if name != "train"):
        predictions, loss = predict(model, splits[name], tokenizer, decoding.max_answer_length, config, dtype)
        scores[name], rows[name] = score_split(predictions, splits[name].examples, loss, decoding), []
        for example, prediction in zip(splits[name].examples, predictions):
            more = {"post": example.post, "question": example.question, "gold": example.texts, "split": name}
            rows[name].append(answer_row(example.id, example.context, prediction, decoding, **more))
    return scores | {"cautions": cautions + find_low_scores(scores, config)}, rows


def write_reports(run: Run, test: Split, scores: dict, rows: dict[str, list[dict]], config: Config) -> None:
    """report.md, report.html and predictions/ of a run, from what score_splits gives."""
    (run.path / "predictions").mkdir(exist_ok=True)
    for name, some in rows.items():
        lines = [{key: row[key] for key in row if key != "n_best"} for row in some]
        write_lines(run.path / "predictions" / f"{name}_predictions.jsonl", lines)
    lines, errors = report(scores, run.evaluations(), config), worst_errors(test.examples, rows["test"])
    write_text(run.path / "report.md", "\n".join([*lines, *error_lines(errors, "test")]))
    html = page("\n".join(lines), run.records(), config.metric, error_page(errors, "test"))
    write_text(run.path / "report.html", html)


def describe_data(data: Path, examples: list[Example], config: Config) -> list[str]:
    """What a labelled file is to a run: its size, and how far the run was trained or chosen on it."""
    scored = f"{len(examples)} examples, scored by the best model of {displayed(run_path(config))}"
    lines = [f"# {displayed(data)}", "", f"{scored}: epoch and thresholds were chosen on that run's validation.", ""]
    recorded = read_run(run_path(config))["environment"].get("data") or {}
    here = data_digests(config.model_copy(update={"data_dir": str(data)}))
    if same := [name for name, digest in here.items() if digest in recorded.values()]:
        lines += [f"- The run was trained and chosen on this very file: {', '.join(same)}"]
    try:
        if data_digests(config) != recorded:
            raise UserError("it has changed")
        texts = {same_text(example.context) for example in load_examples(config)[0]["train"]}
    except (UserError, OSError) as error:
        return [*lines, f"- How many of its texts the run was trained on is not known, its data is not there: {error}"]
    known = sum(same_text(example.context) in texts for example in examples)
    return [*lines, f"- {known} of the {len(examples)} examples have a text that the run was trained on"]


def main(config: Config, split: str, data: str, metrics_output: str, predictions_output: str) -> None:
    path = run_path(config)
    for output in filter(None, (metrics_output, predictions_output)):
        if not Path(output).absolute().parent.is_dir():
            raise UserError(f"{output}: there is no such folder")
    if data and split != "all":
        raise UserError("--data is scored whole: leave --split out")
    dtype = autocast_dtype(config.amp, pick_device())
    best_folder(path)  # before the lock: where there is no run, none is made
    run = None
    if data:
        source = read_source(config.model_copy(update={"data_dir": str(Path(data).resolve())}))
        examples, cautions = {"data": source.examples + source.test}, []
        lines = [*describe_data(Path(data).resolve(), examples["data"], config), ""]
    else:
        run = Run(path, None, {}, data=data_digests(config))
        examples, _ = load_examples(config)
        lines, cautions = [], find_cautions(examples)
    warn_of_use(path, dtype)

    best, names = load_best(path, config), ("data",) if data else SPLITS[split]
    splits = {name: make_split(examples[name], best[0], config) for name in names}
    scores, rows = score_splits(splits, best, cautions, config, dtype)
    lines += score_lines(scores, names)
    if data:
        lines += error_lines(worst_errors(examples["data"], rows["data"]), data)
    elif split == "all":
        write_reports(run, splits["test"], scores, rows, config)
        lines = [(path / "report.md").read_text(encoding="utf-8")]
    if run:
        run.close()
    print("\n".join(lines))
    if metrics_output:
        write_json(Path(metrics_output), scores)
    if predictions_output:
        write_lines(Path(predictions_output), [*chain(*rows.values())])


if __name__ == "__main__":
    flags = {
        "split": {"choices": SPLITS, "default": "all", "help": "which split; all writes the report"},
        "data": {"default": "", "help": "a SQuAD file or folder that is scored instead; nothing in the run is written"},
        "metrics_output": {"default": "", "help": "JSON file for all scores"},
        "predictions_output": {"default": "", "help": "JSON-lines file for all predictions with their n best"},
    }
    sys.exit(run_script(main, __doc__, trained=True, shown=FREE - {"model"}, **flags))
