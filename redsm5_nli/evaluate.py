"""Score a run's best model on validation and test; write report.md and predictions/.

    python redsm5_nli/evaluate.py --run_dir redsm5_nli/runs/...
"""

import csv
import io
import sys
from collections import Counter
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import Run, RunError, begun_in, best_folder, read_json, write_text
from common.metrics import classification_metrics, per_label_metrics, ranking_metrics
from redsm5_nli.config import ROOT, Config, run_path, run_script, saved_config
from redsm5_nli.criteria import Criterion, load_criteria
from redsm5_nli.dataset import Encoder, Post, fingerprint, load_splits, make_examples, make_loader, sorted_batches
from redsm5_nli.model import (
    LABELS,
    Matcher,
    build_model,
    class_weights,
    load_weights,
    make_encoder,
    pair_loss,
    pick_device,
    weights_dtype,
)


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined."""
    cells = [header, ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def chosen_criteria(config: Config) -> tuple[Criterion, ...]:
    return load_criteria(ROOT / config.criteria_file if config.criteria_file else None)


def count_cut(splits: dict[str, list[Post]], encoder: Encoder) -> dict[str, int]:
    """For each split how many posts are longer than max_length allows, and lose their tail."""
    examples = {name: make_examples(posts, encoder.criteria, encoder.share_post) for name, posts in splits.items()}
    return {name: encoder.lengths(rows)[1] for name, rows in examples.items()}


def print_summary(splits: dict[str, list[Post]], kinds: Counter, encoder: Encoder, config: Config) -> None:
    """The tables of what is trained on: posts, pairs, positive pairs of each criterion, lengths in tokens."""
    rows, per_criterion = [], []
    for name, posts in splits.items():
        lengths, cut = encoder.lengths(make_examples(posts, encoder.criteria, encoder.share_post))
        labels = labels_of(posts)
        percentiles = np.percentile(lengths, (50, 95, 100)).astype(int).tolist()
        without = int((labels.sum(1) == 0).sum())
        counts = [len(posts), without, labels.size, int(labels.sum()), f"{labels.mean():.1%}"]
        rows.append([name, *counts, *percentiles, cut])
        per_criterion.append(labels.sum(0).tolist())
    header = ["split", "posts", "with no criterion", "pairs", "positive", "share", "tokens p50", "p95", "max"]
    print("\n".join(table([*header, f"posts cut to {config.max_length}"], rows)[:-1]))
    counts = [[c.id, *numbers] for c, *numbers in zip(encoder.criteria, *per_criterion)]
    print("\n".join(table(["positive pairs", *splits], counts)[:-1]))
    print(f"annotations: {', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}; a bad row would end the run")
    if absent := [criterion.id for criterion, n in zip(encoder.criteria, per_criterion[0]) if n == 0]:
        print(f"no positive training pair: {', '.join(absent)} (an id is a DSM5_symptom of the annotations)")


def labels_of(posts: list[Post]) -> np.ndarray:
    """(P, C) of 0 and 1."""
    return np.array([post.labels for post in posts])


def predict_logits(model: Matcher, posts: list[Post], encoder: Encoder, config: Config) -> torch.Tensor:
    """Logits (P, C, 2) in fp32 on the CPU, in the order of posts; batches are sorted by length."""
    examples = make_examples(posts, encoder.criteria, encoder.share_post)
    batches = sorted_batches(encoder.lengths(examples)[0], config.eval_batch_size)
    device = next(model.parameters()).device
    model.eval()
    logits = torch.empty(len(examples), len(examples[0].criteria), len(LABELS))
    bar = tqdm(make_loader(examples, batches, encoder, config), leave=False, disable=None, desc="evaluating")
    with torch.inference_mode():
        for rows, batch in zip(batches, bar):
            batch.pop("labels", None)
            logits[rows] = model(**{name: t.to(device, non_blocking=True) for name, t in batch.items()}).cpu()
    return logits.view(len(posts), len(encoder.criteria), len(LABELS))


def probabilities(logits: torch.Tensor) -> np.ndarray:
    """(..., 2) logits -> (...) probability of "yes"."""
    return logits.double().softmax(dim=-1)[..., 1].numpy()


def tune_threshold(probability: np.ndarray, labels: np.ndarray) -> float:
    """The threshold t whose rule "yes where probability >= t" has the best macro-F1 on these rows.

    Exact over all cuts between distinct probabilities; the middle of the best gap, and .5 where .5 lies in it. Of
    equally good gaps the one whose middle is nearest to .5.
    """
    order = np.argsort(-probability, kind="stable")
    ordered, n, positives = probability[order], len(labels), int(labels.sum())
    taken = np.arange(n + 1)  # predicted as yes: the taken rows of highest probability
    true_positives = np.concatenate([[0], np.cumsum(labels[order])])
    true_negatives = (n - positives) - (taken - true_positives)
    f1_yes = 2 * true_positives / np.maximum(taken + positives, 1)
    f1_no = 2 * true_negatives / np.maximum(2 * n - taken - positives, 1)
    upper, lower = np.concatenate([[1.0], ordered]), np.concatenate([ordered, [0.0]])  # the gap that holds t
    middle = (upper + lower) / 2
    middle = np.where(middle > lower, middle, upper)  # between neighbours of one rounding
    scores = np.where(upper > lower, f1_yes + f1_no, -1.0)
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    best = best[np.abs(middle[best] - 0.5).argmin()]
    return 0.5 if lower[best] < 0.5 <= upper[best] else float(middle[best])


def tune_thresholds(probability: np.ndarray, labels: np.ndarray, criteria: tuple[Criterion, ...]) -> dict:
    """One threshold for all pairs, and one for each criterion; where a criterion has no positive pair, the former."""
    common = tune_threshold(probability.ravel(), labels.ravel())
    columns = zip(criteria, probability.T, labels.T)
    return {"global": common, "criteria": {c.id: tune_threshold(p, y) if y.any() else common for c, p, y in columns}}


def score_split(logits: torch.Tensor, posts: list[Post], thresholds: dict, weights: torch.Tensor | None) -> dict:
    """Loss, areas, and for each of three rules (RULES) the scores of all pairs and of each criterion."""
    labels, probability = labels_of(posts), probabilities(logits)
    scores = {"loss": pair_loss(logits, torch.from_numpy(labels), weights).mean().item()}
    scores |= ranking_metrics(labels.ravel(), probability.ravel())
    names, own = list(thresholds["criteria"]), np.array(list(thresholds["criteria"].values()))
    for name, threshold in (("at_half", 0.5), ("at_global", thresholds["global"]), ("at_criteria", own)):
        predictions = (probability >= threshold).astype(int)
        pairs = classification_metrics(labels.ravel(), predictions.ravel(), LABELS)
        each = per_label_metrics(labels, predictions, names)
        scores[name] = pairs | {"f1_positive": pairs["per_class"]["yes"]["f1"], "criteria": each}
    return scores


def evaluate_run(
    run: Run, model: Matcher, splits: dict[str, list[Post]], encoder: Encoder, config: Config
) -> dict:
    """Scores of the best weights, loaded into model, on validation and test; writes predictions/ and report.md."""
    folder, criteria = best_folder(run.path), encoder.criteria
    load_weights(model, folder)
    thresholds = read_thresholds(folder, criteria)
    weights = class_weights(config.class_weights, labels_of(splits["train"]).ravel().tolist())
    scores: dict = {"thresholds": thresholds, "posts_cut": count_cut(splits, encoder)}
    history = [record for record in run.history() if record["event"] == "evaluation"]
    (run.path / "predictions").mkdir(exist_ok=True)
    for name in ("validation", "test"):
        logits = predict_logits(model, splits[name], encoder, config)
        scores[name] = score_split(logits, splits[name], thresholds, weights)
        text = predictions_csv(logits, splits[name], criteria, name)
        write_text(run.path / "predictions" / f"{name}_predictions.csv", text)
    write_text(run.path / "report.md", report(scores, splits, history, config))
    return scores


def predictions_csv(logits: torch.Tensor, posts: list[Post], criteria: tuple[Criterion, ...], split: str) -> str:
    """post_id, criterion, probability of yes, annotated label, split."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["post_id", "criterion", "probability", "label", "split"])
    for post, row in zip(posts, probabilities(logits).tolist()):
        for criterion, p, label in zip(criteria, row, post.labels):
            writer.writerow([post.id, criterion.id, f"{p:.6f}", label, split])
    return text.getvalue()


def read_thresholds(folder: Path, criteria: tuple[Criterion, ...]) -> dict:
    """The thresholds that were tuned with the model in a best folder. Raises RunError."""
    path = folder / "thresholds.json"
    thresholds = read_json(path)
    found = thresholds.get("criteria")
    if not isinstance(found, dict) or list(found) != [criterion.id for criterion in criteria]:
        raise RunError(f"{path} holds no threshold for each of {', '.join(criterion.id for criterion in criteria)}")
    for name, value in {"global": thresholds.get("global"), **found}.items():
        if not isinstance(value, float) or not 0 <= value <= 1:
            raise RunError(f"{path}: {name} is {value!r}, expected a number from 0 to 1")
    return thresholds


def check_data(run: Run, splits: dict[str, list[Post]], criteria: tuple[Criterion, ...], config: Config) -> None:
    """Refuse to go on with, or to score, other rows than a run began with: training rows could become test rows."""
    if run.environment.get("data_sha256") != fingerprint(splits, criteria):
        raise RunError(
            f"{config.data_dir} does not hold the rows that {run.path} was begun with, or its criteria were others: "
            "bring them back"
        )


def say_precision(path: Path, config: Config, device: torch.device) -> None:
    """Tell where this machine or --amp computes in another type than the run was trained in."""
    trained = begun_in(path).get("dtype")
    if trained != str(now := weights_dtype(config.amp, device)):
        print(f"trained in {trained}, now in {now}: scores can differ from the run's own", file=sys.stderr)


RULES = {"at_half": ".5", "at_global": "one threshold", "at_criteria": "a threshold for each criterion"}
COLUMNS = ("accuracy", "f1_macro", "f1_positive")


def report(scores: dict, splits: dict[str, list[Post]], history: list[dict], config: Config) -> str:
    """The readable evaluation, in Markdown."""
    model = f"{config.model}, {config.adapter} of rank {config.rank}, {config.pooler} pooling."
    cut = ", ".join(f"{name} {n} of {len(splits[name])}" for name, n in scores["posts_cut"].items())
    lines = ["# Does the post show the criterion?", "", model]
    lines += ["Epoch and thresholds were chosen on validation; test is only reported."]
    lines += [f"Posts that lost their tail at max_length {config.max_length}: {cut}."]
    lines += ["This is a text classifier and gives no diagnosis.", "", "## All pairs", ""]
    names = ("validation", "test")
    rows = []
    for name in names:
        for key, rule in RULES.items():
            found, tuned_here = scores[name][key], name == "validation" and key != "at_half"
            columns = [found[column] for column in COLUMNS]
            rows.append([name, rule + ", tuned here" * tuned_here, *columns, found["criteria"]["f1_macro"]])
    lines += table(["split", "threshold", *COLUMNS, "mean f1 of the criteria"], rows)
    columns = ["auprc", "auc", "loss"]
    lines += table(["split", *columns], [[name, *(scores[name][column] for column in columns)] for name in names])
    per_criterion = scores["test"]["at_half"]["criteria"]["per_label"]
    if absent := [name for name, row in per_criterion.items() if not row["support"]]:
        lines += [f"Without a positive test pair, and 0 in the means: {', '.join(absent)}.", ""]
    for key, rule in RULES.items():
        lines += [f"## Test, {rule}", "", *criteria_table(scores["test"][key]["criteria"], key, scores["thresholds"])]
    columns = ["epoch", "step", "train_loss", "loss", *COLUMNS, "auprc"]
    lines += ["## Epochs (validation, threshold .5)", "", *table(columns, [[r[c] for c in columns] for r in history])]
    return "\n".join(lines)


def criteria_table(scores: dict, rule: str, thresholds: dict) -> list[str]:
    columns, rows = ["precision", "recall", "f1", "support"], []
    for name, row in scores["per_label"].items():
        threshold = {"at_half": 0.5, "at_global": thresholds["global"]}.get(rule, thresholds["criteria"][name])
        rows.append([name, threshold, *(row[column] for column in columns)])
    rows.append(["mean", "", *(scores[f"{column}_macro"] for column in columns[:3]), ""])
    return table(["criterion", "threshold", *columns], rows)


def main(config: Config) -> None:
    path, device = run_path(config), pick_device()
    best_folder(path)  # before the lock: where there is no run, none is made
    criteria = chosen_criteria(config)
    splits, _ = load_splits(config, criteria)
    run = Run(path, saved_config(path / "config.json"), {})
    check_data(run, splits, criteria, config)
    encoder = make_encoder(config, criteria)
    say_precision(path, config, device)
    if run.results is None:
        print("the run is not finished: this is its best epoch so far", file=sys.stderr)
    evaluate_run(run, build_model(config, device), splits, encoder, config)
    print((path / "report.md").read_text(encoding="utf-8"))
    run.close()


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__, trained=True))
