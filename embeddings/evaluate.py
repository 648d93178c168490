"""Score a run's best model on what chose its step and, if it is there, sts-test.csv; or on files through mteb.

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

from common.checkpoint import UserError
from common.checkpoint.files import write_text
from common.checkpoint.run import Run, best_folder
from embeddings.batching import Tokens
from embeddings.cli import run_path, run_script
from embeddings.config import Config
from embeddings.dataset import Splits, data_digests, load_splits
from embeddings.dev import Dev
from embeddings.model import Embedder, embed_texts, embed_tokens, load_embedder
from embeddings.parallel import Processes, all_reduce
from embeddings.report import report


def validate(model: Embedder, tokens: Tokens, dev: Dev, config: Config, processes: Processes) -> dict:
    """The scores that choose the step; each process embeds its share of the texts."""
    vectors = torch.zeros(len(dev.texts), model.encoder.config.hidden_size)
    own = np.arange(len(vectors))[processes.rank :: processes.world]
    vectors[own] = embed_tokens(model, tokens, own, config)
    return dev.score(all_reduce(vectors, processes))[0]


def evaluate_run(run: Run, splits: Splits, config: Config) -> dict:
    """Scores of the best model on validation and test; writes predictions/ and report.md into the run."""
    model, tokenizer = load_embedder(config)
    (run.path / "predictions").mkdir(exist_ok=True)
    scores: dict = {"validation": None, "test": None}
    for name in scores:
        if split := getattr(splits, name):
            vectors = torch.from_numpy(embed_texts(model, tokenizer, split.texts, config))
            scores[name], found = split.score(vectors)
            lines = [json.dumps(row | got, ensure_ascii=False) + "\n" for row, got in zip(split.rows, found)]
            write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
    write_text(run.path / "report.md", report(scores, splits, run.evaluations(), config))
    return scores


def main(config: Config, sts: list[str], beir: list[str], base: bool) -> None:
    if sts or beir:
        from embeddings.local_tasks import evaluate_files  # mteb takes seconds to import

        print(evaluate_files(config, base, sts, beir))
        return
    if base:
        raise UserError("--base goes with --sts or --beir; step 0 of report.md has the base's score on validation")
    path = run_path(config)
    best_folder(path)  # before the lock: where there is no run, none is made
    run = Run(path, None, {}, data=data_digests(config))
    evaluate_run(run, load_splits(config), config)
    run.close()
    print((path / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    flags = {
        "sts": {"nargs": "+", "default": [], "help": "files of scored pairs, in STS-B's or SICK's format"},
        "beir": {"nargs": "+", "default": [], "help": "folders of retrieval data, in BEIR's format"},
        "base": {"action": "store_true", "help": "with --sts or --beir: the model without its adapter"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
