"""The tests are of the CPU, also where there is a GPU, with one thread: on a busy machine two are slower."""

import csv
import os
import tempfile
from pathlib import Path

import pytest
import torch

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first look for a GPU; the scripts that tests start inherit it
# Where the weights are on the machine the tests must not find them: some tell what is missing.
os.environ |= dict.fromkeys(("HF_HOME", "HF_HUB_CACHE"), tempfile.mkdtemp()) | {"HF_HUB_OFFLINE": "1"}
torch.set_num_threads(1)


@pytest.fixture
def few_posts():
    """A function that writes ReDSM5's files with the first posts of evidence_spans' sample alone into a folder."""
    sample = Path(__file__).resolve().parents[1] / "evidence_spans/sample"

    def write(folder: Path, count: int) -> Path:
        folder.mkdir(exist_ok=True)
        kept: set[str] = set()
        for name in ("redsm5_posts.csv", "redsm5_annotations.csv"):
            with open(sample / name, encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            kept = kept or {row[0] for row in rows[:count]}
            with open(folder / name, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([header, *(row for row in rows if row[0] in kept)])
        return folder

    return write
