"""Score a run's best model on sts-dev.csv and, where there is one, sts-test.csv; or on files of your own through mteb.

    python embeddings/evaluate.py --run_dir embeddings/runs/...                 # report.md and predictions/ again
    python embeddings/evaluate.py --run_dir embeddings/runs/... --sts sts-dev.csv SICK_trial.txt --beir scifact [--base]

--sts takes files in STS-B's or SICK's format, --beir folders with corpus.jsonl, queries.jsonl and qrels/test.tsv; the
scores are mteb's own. --base scores the model without its adapter; it needs no run: --model names it.
"""

import json
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import Run, RunError, best_folder, write_text
from common.metrics import correlation_metrics
from embeddings.config import Config, UserError, run_path, run_script, saved_config
from embeddings.dataset import Pair, Rows, Splits, Tokens, fingerprint, load_splits, repeated_in_test, tokenize
from embeddings.model import embed_tokens, load_embedder


def pair_texts(pairs: list[Pair]) -> list[str]:
    """All first sentences, then all second ones."""
    return [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs]


def correlation(vectors: Tensor, pairs: list[Pair]) -> tuple[dict, np.ndarray]:
    """correlation_metrics of people's scores with the cosines (N,), and these; vectors (2 N, D) of pair_texts.

    Raises UserError where vectors are not finite or all the same.
    """
    if not torch.isfinite(vectors).all():
        raise UserError("the vectors are not finite: a lower learning_rate, or amp bf16 or off, may help")
    first, second = vectors.double().chunk(2)
    cosines = (first * second).sum(1).numpy()
    if np.ptp(cosines) < 1e-6:  # rounding alone
        raise UserError("all pairs have the same cosine: as with pooling cls, which shows a causal decoder one token")
    return correlation_metrics([pair.score for pair in pairs], cosines.tolist()), cosines


def check_data(run: Run, splits: Splits, config: Config) -> None:
    """Refuse to go on with, or to score, other rows than a run began with: training rows could become test rows."""
    if run.environment.get("data_sha256") != fingerprint(splits):
        raise RunError(f"{config.data_dir} does not hold the rows that {run.path} was begun with: bring them back")


def table(header: list[str], rows: list[list]) -> list[str]:
    """A Markdown table, floats with four decimals, "-" for what is undefined."""
    cells = [header, ["---"] * len(header)]
    for row in rows:
        cells.append([f"{c:.4f}" if isinstance(c, float) else "-" if c is None else str(c) for c in row])
    return ["| " + " | ".join(row) + " |" for row in cells] + [""]


def print_summary(splits: Splits, tokens: Tokens, rows: Rows, config: Config) -> None:
    """The data as the run sees it: rows, distinct texts, lengths, what is cut."""
    lengths = tokens.lengths
    percentiles = np.percentile(lengths, (50, 95, 100)).astype(int).tolist()
    kinds = "triplets" if rows.texts.shape[1] == 3 else "pairs"
    columns = [f"training {kinds}", "distinct texts", "tokens p50", "p95", "max"]
    columns.append(f"cut to {config.max_length}, or as long")
    cut = int((lengths == config.max_length).sum())
    print("\n".join(table(columns, [[len(splits.train), len(lengths), *percentiles, cut]])[:-1]))
    anchors = len(np.unique(rows.identities[:, 0]))
    if repeated := len(splits.train) - anchors:
        print(f"{repeated} rows repeat another row's anchor: never in one batch with it")
    columns = ["judged pairs", "rows", "mean score", "scores 5 / 50 / 95 %"]
    judged = [(name, pairs) for name, pairs in splits._asdict().items() if name != "train" and pairs]
    lines = []
    for name, pairs in judged:
        scores = [pair.score for pair in pairs]
        spread = " / ".join(f"{value:.1f}" for value in np.percentile(scores, [5, 50, 95]))
        lines.append([name, len(pairs), f"{np.mean(scores):.2f}", spread])
    print("\n".join(table(columns, lines)[:-1]))
    if not splits.test:
        print("no sts-test.csv: no test figure will be reported")
    elif seen := repeated_in_test(splits):
        print(f"{seen} of the {len(splits.test)} test pairs are also in sts-dev.csv")
    print("rows dropped: 0 (blank lines are skipped, a bad row ends the run)")


def evaluate_run(run: Run, splits: Splits, config: Config) -> dict:
    """Scores of the best model on validation and test; writes predictions/ and report.md into the run."""
    model, tokenizer = load_embedder(config)
    (run.path / "predictions").mkdir(exist_ok=True)
    scores = {}
    for name, pairs in [("validation", splits.validation), ("test", splits.test)]:
        if pairs:
            tokens = tokenize(pair_texts(pairs), tokenizer, config)
            vectors = embed_tokens(model, tokens, np.arange(2 * len(pairs)), tokenizer.pad_token_id, config)
            scores[name], cosines = correlation(vectors, pairs)
            found = [pair._asdict() | {"cosine": round(float(cosine), 6)} for pair, cosine in zip(pairs, cosines)]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
            write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    history = [record for record in run.history() if record["event"] == "evaluation"]
    write_text(run.path / "report.md", report(scores, splits, history, config))
    return scores


def report(scores: dict, splits: Splits, history: list[dict], config: Config) -> str:
    """The readable evaluation."""
    lines = [f"# {config.model} on {config.data_dir}", ""]
    lines += ["Correlation of the cosine with people's scores. The step was chosen on validation: its row flatters."]
    lines += [f"These are of the model in best/ as it is saved, adapter merged, computed with amp {config.amp}."]
    if splits.test:
        seen = f"{repeated_in_test(splits)} of its {len(splits.test)} pairs"
        lines += [f"Nothing was chosen on test; {seen} are also in sts-dev.csv.", ""]
    else:
        lines += ["There is no test split: no test figure.", ""]
    columns = ["pairs", "spearman", "pearson"]
    rows = [[name, *(found[column] for column in columns)] for name, found in scores.items()]
    lines += table(["split", *columns], rows)
    columns = ["step", "epoch", "spearman", "pearson"]
    lines += ["## Steps (validation, before merging, as the step was chosen; 0: without adapter)", ""]
    lines += table(columns, [[record[column] for column in columns] for record in history])
    return "\n".join(lines)


def main(config: Config, sts: list[str], beir: list[str], base: bool) -> None:
    if sts or beir:
        from embeddings.local_tasks import evaluate_files  # mteb takes seconds to import

        print(evaluate_files(config, base, sts, beir))
        return
    path = run_path(config)
    if base:
        raise UserError("--base goes with --sts or --beir; on sts-dev.csv the base's score is step 0 of report.md")
    best_folder(path)  # before the lock: where there is no run, none is made
    splits = load_splits(config)
    run = Run(path, saved_config(path / "config.json"), {})
    check_data(run, splits, config)
    evaluate_run(run, splits, config)
    print((path / "report.md").read_text(encoding="utf-8"))
    run.close()


if __name__ == "__main__":
    flags = {
        "sts": {"nargs": "+", "default": [], "help": "files of scored pairs, in STS-B's or SICK's format"},
        "beir": {"nargs": "+", "default": [], "help": "folders of retrieval data, in BEIR's format"},
        "base": {"action": "store_true", "help": "with --sts or --beir: the model without its adapter"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
