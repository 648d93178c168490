"""Score a run's best model on validation and test, and write report.md, report.html and predictions/ again.

    python redsm5_nli/evaluate.py --run_dir redsm5_nli/runs/...
    python redsm5_nli/evaluate.py --run_dir redsm5_nli/runs/... --data FOLDER    # other labelled posts; writes nothing

P posts, C criteria, N examples
"""

import csv
import io
import sys
from pathlib import Path
from typing import TextIO

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import ROOT, UserError
from common.checkpoint.environment import pick_device
from common.checkpoint.files import write_text
from common.checkpoint.identity import file_digest
from common.checkpoint.run import Run, best_folder, compare_model, read_best, read_run, warn_of_use
from common.checkpoint.texts import same_text
from redsm5_nli.cli import displayed, run_path, run_script
from redsm5_nli.config import Config
from redsm5_nli.criteria import Criterion, load_criteria
from redsm5_nli.dataset import LABELS, Collator, Split, data_digests, load_splits, make_loader, sorted_batches
from redsm5_nli.errors import error_lines
from redsm5_nli.html_report import page
from redsm5_nli.loss import class_weights, pair_loss
from redsm5_nli.model import Matcher, build_model, decoder_dtype, find_collator, load_weights
from redsm5_nli.redsm5 import ANNOTATIONS_FILES, POSTS_FILES, Post, find_file, read_posts
from redsm5_nli.report import COLUMNS, criterion_tables, pair_tables, report, unread_line
from redsm5_nli.splits import split_posts
from redsm5_nli.thresholds import read_thresholds, tune_thresholds


def predict_logits(model: Matcher, split: Split, collator: Collator, config: Config, bar: bool = True) -> Tensor:
    """Logits (P, C, 2) in fp32 on the CPU, in the order of the posts; batches are sorted by length."""
    batches = sorted_batches(split.lengths, config.eval_batch_size)
    device = next(model.parameters()).device
    model.eval()
    logits = torch.empty(len(split.lengths), len(split.groups[0]), len(LABELS))
    loader = make_loader(split, batches, collator, config)
    with torch.inference_mode():
        for rows, batch in zip(batches, tqdm(loader, leave=False, disable=None if bar else True, desc="evaluating")):
            batch.pop("labels", None)
            logits[rows] = model(**{name: t.to(device, non_blocking=True) for name, t in batch.items()}).cpu()
    return logits.view(len(split.posts), -1, len(LABELS))  # N is P, or P * C


def probabilities(logits: Tensor) -> np.ndarray:
    """(..., 2) logits -> (...) probability of "yes"."""
    return logits.double().softmax(dim=-1)[..., 1].numpy()


def score_split(logits: Tensor, labels: np.ndarray, thresholds: dict, weights: Tensor | None) -> dict:
    """Mean loss, areas, and for each of three rules (RULES) the scores of all pairs and of each criterion."""
    from common.metrics import classification_metrics, per_label_metrics, ranking_metrics

    probability = probabilities(logits)  # (P, C), as labels
    scores = {"loss": pair_loss(logits, torch.from_numpy(labels), weights).mean().item()}
    scores |= ranking_metrics(labels.ravel(), probability.ravel())
    names, own = list(thresholds["criteria"]), np.array(list(thresholds["criteria"].values()))
    for name, threshold in (("at_half", 0.5), ("at_global", thresholds["global"]), ("at_criteria", own)):
        predictions = (probability >= threshold).astype(int)
        pairs = classification_metrics(labels.ravel(), predictions.ravel(), LABELS)
        each = per_label_metrics(labels, predictions, names)
        scores[name] = pairs | {"f1_positive": pairs["per_class"]["yes"]["f1"], "criteria": each}
    return scores


def validate(
    model: Matcher, split: Split, collator: Collator, weights: Tensor | None, config: Config
) -> tuple[dict, dict]:
    """Validation scores at .5, which choose the epoch, and the thresholds that are best on these posts."""
    logits = predict_logits(model, split, collator, config)
    if not torch.isfinite(logits).all():
        raise UserError("the validation logits are not finite; best/ is untouched. A lower learning_rate may help")
    thresholds = tune_thresholds(probabilities(logits), split.labels, collator.criteria)
    scores = score_split(logits, split.labels, thresholds, weights)
    at_half = {name: scores["at_half"][name] for name in COLUMNS}
    return {"loss": scores["loss"], **at_half, "auprc": scores["auprc"]}, thresholds


def evaluate_run(run: Run, model: Matcher, splits: dict[str, Split], collator: Collator, config: Config) -> dict:
    """Scores of the best weights, loaded into model, on validation and test; writes predictions/ and the report."""

    def load(folder: Path) -> dict:
        load_weights(model, folder)
        return read_thresholds(folder, collator.criteria)

    thresholds = read_best(run.path, load)
    weights = class_weights(config.class_weights, splits["train"].labels)
    scores: dict = {"thresholds": thresholds, "posts_cut": {name: split.cut for name, split in splits.items()}}
    (run.path / "predictions").mkdir(exist_ok=True)
    for name in ("validation", "test"):
        split, text = splits[name], io.StringIO()
        logits = predict_logits(model, split, collator, config)
        scores[name] = score_split(logits, split.labels, thresholds, weights)
        more = {"label": split.labels, "split": np.full(split.labels.shape, name)}
        probability = probabilities(logits)
        write_pairs(text, split.posts, collator.criteria, probability, more)
        write_text(run.path / "predictions" / f"{name}_predictions.csv", text.getvalue())

    # Of test, the last one, also what was wrong
    wrong = error_lines("Test", split, probability, thresholds["global"], scores[name], collator.criteria)
    markdown = "\n".join([report(scores, splits, run.evaluations(), config), *wrong])
    write_text(run.path / "report.md", markdown)
    write_text(run.path / "report.html", page(markdown, run.records(), config.metric))
    return scores


def write_pairs(
    file: TextIO, posts: list[Post], criteria: tuple[Criterion, ...], probability: np.ndarray, more: dict
) -> None:
    """A CSV row for each pair: post_id, criterion, probability of yes, and what more has, column -> (P, C)."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["post_id", "criterion", "probability", *more])
    for row, post in enumerate(posts):
        for column, criterion in enumerate(criteria):
            cells = [values[row, column] for values in more.values()]
            writer.writerow([post.id, criterion.id, f"{probability[row, column]:.6f}", *cells])


def load_best(path: Path, config: Config) -> tuple[Matcher, Collator, dict]:
    """The best model of a run, the collator of its criteria, and its thresholds. Raises UserError.

    They are of one epoch, also while training saves another. The run's data is not needed.
    """
    best_folder(path)  # before the decoder, which takes long
    compare_model(path, config.model)
    device = pick_device()
    model = build_model(config, device, decoder_dtype(config.amp, device))

    def load(folder: Path) -> tuple[tuple[Criterion, ...], dict]:
        load_weights(model, folder)
        criteria = load_criteria(folder / "criteria.json")
        return criteria, read_thresholds(folder, criteria)

    criteria, thresholds = read_best(path, load)
    return model, find_collator(config, criteria), thresholds


def evaluate_folder(path: Path, config: Config, folder: Path) -> None:
    """Print the scores and the worst errors of a run's best model on labelled posts of a folder. Raises UserError."""
    model, collator, thresholds = load_best(path, config)
    posts, _, unread = read_posts(folder, collator.criteria)
    split, name = collator.make_split(posts), folder.resolve().name
    logits = predict_logits(model, split, collator, config)
    scores = score_split(logits, split.labels, thresholds, None)
    lines = [
        f"# {folder}: {len(posts)} posts, {split.labels.size} pairs, {split.labels.sum()} of them positive",
        "",
        f"Epoch and thresholds were chosen by {displayed(path)} on its own validation posts. The loss has no weights.",
        seen_before(path, config, folder, posts, collator.criteria),
        f"Posts that lost their tail at max_length {config.max_length}: {split.cut}.",
        *([unread_line(unread)] if unread else []),
        "",
        *pair_tables({name: scores}),
        *criterion_tables(name, scores, thresholds),
        *error_lines(name, split, probabilities(logits), thresholds["global"], scores, collator.criteria),
    ]
    print("\n".join(lines))


def seen_before(path: Path, config: Config, folder: Path, posts: list[Post], criteria: tuple[Criterion, ...]) -> str:
    """What to say of posts to be scored that the run was trained on."""
    recorded = read_run(path)["environment"].get("data") or {}
    files = [find_file(folder, names) for names in (POSTS_FILES, ANNOTATIONS_FILES)]
    if known := [file.name for file in files if file_digest(file) in recorded.values()]:
        return f"The run was trained and chosen on this very {' and '.join(known)}."
    try:
        if data_digests(config) != recorded:
            raise UserError(f"{ROOT / config.data_dir} does not hold the files that the run was begun with")
        trained = split_posts(read_posts(ROOT / config.data_dir, criteria)[0], config)["train"]
    except UserError as error:
        return f"Whether training had these posts could not be looked at: {error}"
    texts = {same_text(post.text) for post in trained}
    seen = sum(same_text(post.text) in texts for post in posts)
    return f"{seen} of the posts also stand in the run's training posts (same text)."


def main(config: Config, data: str) -> None:
    path, device = run_path(config), pick_device()
    dtype = decoder_dtype(config.amp, device)
    best_folder(path)  # before the lock: where there is no run, none is made
    if data:
        warn_of_use(path, dtype, "dtype")
        return evaluate_folder(path, config, Path(data))
    compare_model(path, config.model)
    criteria = load_criteria(config.criteria_file)
    run = Run(path, None, {}, data=data_digests(config))
    collator = find_collator(config, criteria)
    splits, *_ = load_splits(config, collator)
    warn_of_use(path, dtype, "dtype")
    evaluate_run(run, build_model(config, device, dtype), splits, collator, config)
    run.close()
    print((path / "report.md").read_text(encoding="utf-8"))
    return None


if __name__ == "__main__":
    shown = ("run_dir", "data_dir", "criteria_file", "model", "eval_batch_size", "num_workers", "amp")
    flag = {"default": "", "metavar": "FOLDER", "help": "score the labelled posts of this folder, and write nothing"}
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, data=flag))
