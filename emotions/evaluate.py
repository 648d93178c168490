"""Score a run's best model on validation and, where there is one, on test; write report.md and predictions/.

    python emotions/evaluate.py --run_dir emotions/runs/...
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import Run, RunError, begun_in, best_folder, read_json, write_text
from common.metrics import mean_average_precision, multilabel_metrics
from emotions.config import Config, run_path, run_script, saved_config
from emotions.dataset import (
    EMOTIONS,
    NUMBERS,
    Draw,
    Row,
    fingerprint,
    label_counts,
    label_matrix,
    label_shares,
    load_splits,
    make_loader,
    repeated_in_test,
    sorted_batches,
    token_lengths,
)
from emotions.losses import class_weights, emotion_loss
from emotions.model import MODEL_INPUTS, EmotionClassifier, autocast_dtype, load_model, load_tokenizer, pick_device
from emotions.parallel import Processes, still_alive, summed, watched
from emotions.thresholds import Thresholds, cross_fitted, tune

# Ekman's six with neutral, and the sentiments: GoEmotions' own groups (arXiv 2005.00547, sec. 3 and appendix).
EKMAN = {
    "anger": ("anger", "annoyance", "disapproval"),
    "disgust": ("disgust",),
    "fear": ("fear", "nervousness"),
    "joy": (
        *("joy", "amusement", "approval", "excitement", "gratitude", "love", "optimism", "relief", "pride"),
        *("admiration", "desire", "caring"),
    ),
    "sadness": ("sadness", "disappointment", "embarrassment", "grief", "remorse"),
    "surprise": ("surprise", "realization", "confusion", "curiosity"),
    "neutral": ("neutral",),
}
SENTIMENT = {
    "positive": EKMAN["joy"],
    "negative": EKMAN["anger"] + EKMAN["disgust"] + EKMAN["fear"] + EKMAN["sadness"],
    "ambiguous": EKMAN["surprise"],
    "neutral": EKMAN["neutral"],
}
GROUPINGS = {"ekman": EKMAN, "sentiment": SENTIMENT}
RULES = ("at_half", "at_shared", "at_per_label")


def predict_logits(
    model: EmotionClassifier,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    processes: Processes,
    each_batch: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Logits (N, 28) in fp32 on the CPU, in the order of rows, in every process; batches are sorted by length.

    The processes take turns at the batches, equally many each: where they run out, one repeats the first for nothing.
    """
    rank, world, device = processes
    batches = sorted_batches(token_lengths(rows, tokenizer), config.eval_batch_size)
    rounds = -(-len(batches) // world)
    own = (batches + batches[:1] * (rounds * world - len(batches)))[rank::world]
    counts = rounds if rank + (rounds - 1) * world < len(batches) else rounds - 1
    logits = torch.zeros(len(rows), len(EMOTIONS))
    dtype = autocast_dtype(config.amp, device)
    model.eval()
    draws = [Draw(row, row.text) for row in rows]
    loader = make_loader([[draws[place] for place in places] for places in own], tokenizer, config)
    bar = tqdm(loader, leave=False, disable=True if rank else None, desc="evaluating")
    # no_grad, not inference_mode: a sharded model keeps what it gathers here for the next training step
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for number, (places, batch) in enumerate(zip(own, bar)):
            each_batch()
            inputs = {name: batch[name].to(device, non_blocking=True) for name in MODEL_INPUTS if name in batch}
            found = model(**inputs).float().cpu()
            if number < counts:
                logits[places] = found
    return summed(logits, processes)


def probabilities(logits: torch.Tensor) -> np.ndarray:
    """(N, 28) logits -> probabilities: one sigmoid, the only one."""
    return logits.double().sigmoid().numpy()


def mean_loss(logits: torch.Tensor, rows: list[Row], weights: torch.Tensor | None, config: Config) -> float:
    labels, known = (torch.from_numpy(label_matrix(rows, field)) for field in ("labels", "known"))
    return emotion_loss(logits, labels.float(), known, config, weights).mean().item()


def tune_thresholds(logits: torch.Tensor, rows: list[Row], config: Config) -> Thresholds:
    """The thresholds that suit these rows, as logits."""
    labels, known = label_matrix(rows, "labels"), label_matrix(rows, "known")
    return tune(logits.double().numpy(), labels, known, config.threshold_smoothing)


def thresholds_json(thresholds: Thresholds) -> dict:
    """Thresholds as best/thresholds.json holds them: probabilities, by name."""
    shared, per_label = (1 / (1 + np.exp(-np.asarray(value))) for value in thresholds)
    return {"shared": float(shared), "per_label": dict(zip(EMOTIONS, per_label.tolist()))}


def read_thresholds(folder: Path) -> tuple[float, np.ndarray]:
    """The shared threshold and the (28,) per-label ones of a best folder, as probabilities. Raises RunError."""
    path = folder / "thresholds.json"
    saved = read_json(path)
    own = saved.get("per_label")
    values = [saved.get("shared"), *(own.get(name) if isinstance(own, dict) else None for name in EMOTIONS)]
    if not all(isinstance(value, float) and 0 <= value <= 1 for value in values):
        raise RunError(f"{path} does not hold a shared threshold and one for each emotion, from 0 to 1")
    return values[0], np.array(values[1:])


def score_split(logits: torch.Tensor, rows: list[Row], shared: float, per_label: np.ndarray, loss: float) -> dict:
    """All scores of (N, 28) logits: at .5, at the shared and at the per-label thresholds, which are probabilities."""
    labels, known, probability = label_matrix(rows, "labels"), label_matrix(rows, "known"), probabilities(logits)
    predictions = {"at_half": probability >= 0.5, "at_shared": probability >= shared}
    predictions["at_per_label"] = probability >= per_label
    scores = {"rows": len(rows), "loss": loss, "map": mean_average_precision(labels, probability, known)}
    scores |= {rule: multilabel_metrics(labels, cells, EMOTIONS, known) for rule, cells in predictions.items()}
    for name, groups in GROUPINGS.items():
        scores[name] = {rule: group_metrics(labels, cells, known, groups) for rule, cells in predictions.items()}
    return scores


def group_metrics(labels: np.ndarray, predictions: np.ndarray, known: np.ndarray, groups: dict) -> dict:
    """multilabel_metrics of groups of labels: one holds where any of its labels does.

    Where a row knows only some of a group's labels, the group is known if one of those holds, else not.
    """
    columns = [[NUMBERS[name] for name in names] for names in groups.values()]
    true, found = (np.stack([(x & known)[:, own].any(axis=1) for own in columns], 1) for x in (labels, predictions))
    decided = np.stack([known[:, own].all(axis=1) for own in columns], axis=1) | true
    return multilabel_metrics(true, found, tuple(groups), decided)


def evaluate_run(
    run: Run, splits: dict[str, list[Row]], tokenizer: PreTrainedTokenizerFast, config: Config, processes: Processes
) -> dict:
    """Scores of the best model on every split but train; writes predictions/ and report.md into the run."""
    folder = best_folder(run.path)
    model = load_model(folder, config).to(processes.device)
    shared, per_label = read_thresholds(folder)
    weights = class_weights(config.class_weights, *map(torch.from_numpy, label_shares(splits["train"], config)))
    scores: dict = {"thresholds": {"shared": shared, "per_label": dict(zip(EMOTIONS, per_label.tolist()))}}
    (run.path / "predictions").mkdir(exist_ok=True)
    for name in [name for name in splits if name != "train"]:
        rows = splits[name]
        with watched(config):
            logits = predict_logits(model, rows, tokenizer, config, processes, partial(still_alive, config))
        loss = mean_loss(logits, rows, weights, config)
        scores[name] = score_split(logits, rows, shared, per_label, loss)
        if name == "validation":
            scores[name]["cross_fitted"] = cross_fitted_scores(logits, rows, config)
        lines = []
        for row, probability in zip(rows, probabilities(logits)):
            found = {"line": row.line, "id": row.id, "text": row.text, "labels": [EMOTIONS[n] for n in row.labels]}
            found |= answer(probability, per_label)
            lines.append(json.dumps(found, ensure_ascii=False) + "\n")
        write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    history = [record for record in run.history() if record["event"] == "evaluation"]
    write_text(run.path / "report.md", report(scores, splits, history, config))
    return scores


def cross_fitted_scores(logits: torch.Tensor, rows: list[Row], config: Config) -> dict:
    """Scores on rows whose thresholds were tuned on other rows. The epoch alone was chosen with these."""
    labels, known = label_matrix(rows, "labels"), label_matrix(rows, "known")
    arguments = (config.threshold_smoothing, config.split_seed)
    found = cross_fitted(logits.double().numpy(), labels, known, *arguments)
    return {rule: multilabel_metrics(labels, cells, EMOTIONS, known) for rule, cells in zip(RULES[1:], found)}


def answer(probability: np.ndarray, thresholds: np.ndarray) -> dict:
    """One text's emotions, the likeliest first, and all 28 probabilities; both arguments are (28,)."""
    order = np.argsort(-probability, kind="stable")
    predicted = [EMOTIONS[n] for n in order if probability[n] >= thresholds[n]]
    return {"predicted": predicted, "probabilities": {EMOTIONS[n]: round(float(probability[n]), 6) for n in order}}


def check_data(run: Run, splits: dict[str, list[Row]], config: Config) -> None:
    """Refuse to go on with, or to score, other rows than a run began with: training rows could become test rows."""
    if run.environment.get("data_sha256") != fingerprint(splits):
        raise RunError(f"{config.data_dir} does not hold the rows that {run.path} was begun with: bring them back")


def say_precision(path: Path, config: Config, device: torch.device) -> None:
    """Tell where this machine or --amp computes in another type than the run was trained in."""
    trained = begun_in(path).get("autocast")
    if trained != str(now := autocast_dtype(config.amp, device)):
        print(f"trained with autocast {trained}, now {now}: scores can differ from the run's own", file=sys.stderr)


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined."""
    cells = [header, ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def print_summary(splits: dict[str, list[Row]], tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """The data as the run sees it: rows, sources, labels, what is cut, each label's rows."""
    columns = ["split", "rows", "sources", "labels a row", "without label", "tokens p50", "p95", "max"]
    columns.append(f"cut to {config.max_length}")
    rows = []
    for name, split in splits.items():
        lengths = token_lengths(split, tokenizer)
        percentiles = np.percentile(lengths, (50, 95, 100)).astype(int).tolist()
        sources = ", ".join(sorted({row.source or "-" for row in split}))
        mean = np.mean([len(row.labels) for row in split])
        bare = sum(not row.labels for row in split)
        cut = int((lengths > config.max_length).sum())
        rows.append([name, len(split), sources, f"{mean:.2f}", bare, *percentiles, cut])
    print("\n".join(table(columns, rows)[:-1]))
    known = label_matrix(splits["train"], "known").sum(axis=0)
    counts = [label_counts(split) for split in splits.values()]
    rows = [[name, *(count[n] for count in counts), known[n]] for n, name in enumerate(EMOTIONS)]
    print("\n".join(table(["emotion", *splits, "known in train"], rows)[:-1]))
    for name, count in zip(list(splits)[1:], counts[1:]):
        if missing := count.count(0):
            print(f"{missing} of 28 emotions have no positive in {name}: those it knows count as 0 in f1_macro")
    if untaught := [EMOTIONS[n] for n in np.flatnonzero(known == 0)]:
        print(f"no training row knows {', '.join(untaught)}: never predicted")
    if "test" not in splits:
        print("no test.jsonl: no test figure will be reported")
    elif seen := repeated_in_test(splits):
        print(f"{seen} of the {len(splits['test'])} test texts are also in validation")
    print("rows dropped: 0 (blank lines are skipped, a bad row ends the run)")


def report(scores: dict, splits: dict[str, list[Row]], history: list[dict], config: Config) -> str:
    """The readable evaluation; its detail is of the test split, or of validation where there is no test."""
    detail = "test" if "test" in scores else "validation"
    lines = [f"# {config.model} on {config.data_dir}", ""]
    lines += ["The epoch and all thresholds were chosen on validation, so its rows marked tuned flatter. Those marked"]
    lines += ["cross-fitted (thresholds tuned on four fifths, scored on the last, in turn) owe only the epoch to it."]
    if detail == "test":
        seen = f"{repeated_in_test(splits)} of its {len(splits['test'])} texts"
        lines += [f"Nothing was chosen on test; {seen} are also in validation.", ""]
    else:
        lines += ["There is no test split: no test figure.", ""]
    for name in [name for name in splits if name != "train"]:
        per_label, known = scores[name]["at_half"]["per_label"], label_matrix(splits[name], "known").any(axis=0)
        if missing := sum(known[n] and not per_label[emotion]["support"] for n, emotion in enumerate(EMOTIONS)):
            lines += [f"{missing} emotions have no positive in {name}: each counts as 0 in f1_macro.", ""]
    lines += ["## Scores", "", *table(["split", "thresholds", *SCORE_COLUMNS], score_rows(scores))]
    for name in GROUPINGS:
        metrics = scores[detail][name]["at_per_label"]
        lines += [f"## {detail}: {name}, per-label thresholds", "", *per_label_table(metrics["per_label"])]
    lines += [f"## {detail}: emotions", ""]
    columns = ["emotion", "precision", "recall", "f1", "support", "threshold", "f1 at .5", "f1 at shared"]
    half, shared, own = (scores[detail][rule]["per_label"] for rule in RULES)
    thresholds = scores["thresholds"]["per_label"]
    rows = [
        [name, *row.values(), thresholds[name], half[name]["f1"], shared[name]["f1"]]
        for name, row in own.items()
    ]
    lines += table(columns, rows)
    columns = ["epoch", "step", "train_loss", "loss", "map", "f1_macro_at_half", "f1_macro"]
    lines += ["## Epochs (validation; f1_macro at the shared threshold that is best there)", ""]
    lines += table(columns, [[record[column] for column in columns] for record in history])
    return "\n".join(lines)


SCORE_COLUMNS = [
    *("f1_macro", "precision_macro", "recall_macro", "f1_micro", "precision_micro", "recall_micro"),
    *("f1_weighted", "precision_weighted", "recall_weighted", "map", "labels true", "labels predicted"),
]


def score_rows(scores: dict) -> list[list]:
    """A row for each split and way to set the thresholds, in SCORE_COLUMNS."""
    rows = []
    for split in [name for name in ("validation", "test") if name in scores]:
        found = scores[split]
        tuned = "tuned" if split == "validation" else "tuned on validation"
        shared = f"{scores['thresholds']['shared']:.4f}, {tuned}"
        ways = [(".5", found["at_half"]), (shared, found["at_shared"]), (f"per label, {tuned}", found["at_per_label"])]
        if split == "validation":
            ways += [("one, cross-fitted", found["cross_fitted"]["at_shared"])]
            ways += [("per label, cross-fitted", found["cross_fitted"]["at_per_label"])]
        for name, metrics in ways:
            cells = [metrics[column] for column in SCORE_COLUMNS[:9]]
            cells += [found["map"], metrics["cardinality_true"], metrics["cardinality_predicted"]]
            rows.append([split, name, *cells])
    return rows


def per_label_table(per_label: dict) -> list[str]:
    columns = ["precision", "recall", "f1", "support"]
    return table(["group", *columns], [[name, *(row[column] for column in columns)] for name, row in per_label.items()])


def main(config: Config) -> None:
    path, device = run_path(config), pick_device()
    tokenizer = load_tokenizer(config, best_folder(path))  # before the lock: where there is no run, none is made
    splits = load_splits(config)
    run = Run(path, saved_config(path / "config.json"), {})
    check_data(run, splits, config)
    say_precision(path, config, device)
    if run.results is None:
        print("the run is not finished: this is its best epoch so far", file=sys.stderr)
    evaluate_run(run, splits, tokenizer, config, Processes(0, 1, device))
    print((path / "report.md").read_text(encoding="utf-8"))
    run.close()


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__, trained=True))
