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
from embeddings.dataset import Pair, Splits, fingerprint, load_splits
from embeddings.model import embed_texts, load_embedder
from embeddings.report import report


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


def evaluate_run(run: Run, splits: Splits, config: Config) -> dict:
    """Scores of the best model on validation and test; writes predictions/ and report.md into the run."""
    model, tokenizer = load_embedder(config)
    (run.path / "predictions").mkdir(exist_ok=True)
    scores = {}
    for name, pairs in (("validation", splits.validation), ("test", splits.test)):
        if pairs:
            vectors = torch.from_numpy(embed_texts(model, tokenizer, pair_texts(pairs), config))
            scores[name], cosines = correlation(vectors, pairs)
            rows = [pair._asdict() | {"cosine": round(float(cosine), 6)} for pair, cosine in zip(pairs, cosines)]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    write_text(run.path / "report.md", report(scores, splits, run.history(), config))
    return scores


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
