"""Score a run, or a base model, on MTEB's English retrieval: nDCG@10 on the fifteen BEIR tasks, and their average.

    python embeddings/mteb_retrieval.py --run_dir embeddings/runs/... --tasks SciFact NFCorpus   # 9,000 documents
    python embeddings/mteb_retrieval.py --run_dir embeddings/runs/...                            # 33 million
    python embeddings/mteb_retrieval.py --model bert-base-uncased --pooling mean --base --query_prompt "query: "

The tasks and splits are those of MTEB(eng, v1): test, of MSMARCO dev; CQADupstackRetrieval is the mean of twelve. mteb
downloads the data sets; results lie in the run's mteb/, by prompt, and are not computed again. The table goes to
mteb/retrieval.md, or retrieval-base.md. Documents are cut to the run's max_length.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import mteb

from embeddings.cli import run_script
from embeddings.config import Config
from embeddings.mteb_encoder import report_tasks

TASKS = ["ArguAna", "ClimateFEVER", "CQADupstackRetrieval", "DBPedia", "FEVER", "FiQA2018", "HotpotQA", "MSMARCO"]
TASKS += ["NFCorpus", "NQ", "QuoraRetrieval", "SCIDOCS", "SciFact", "Touche2020", "TRECCOVID"]


def main(config: Config, tasks: list[str], base: bool) -> None:
    chosen = [mteb.get_task(name) for name in dict.fromkeys(tasks)]
    print(report_tasks(config, base, "retrieval", chosen, {"ndcg_at_10": "nDCG@10"}, {"fifteen tasks": TASKS}))


if __name__ == "__main__":
    tasks = {"nargs": "+", "choices": TASKS, "default": TASKS, "metavar": "TASK", "help": "some of the fifteen tasks"}
    base = {"action": "store_true", "help": "the model without the adapter; needs no run"}
    shown = ("run_dir", "model", "pooling", "max_length", "query_prompt", "document_prompt", "eval_tokens", "amp")
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, tasks=tasks, base=base))
