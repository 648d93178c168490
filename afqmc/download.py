"""Fetch the model's weights and AFQMC in advance; training itself never uses the network. Safe to run twice.

    python afqmc/download.py                                  # the config's model, and AFQMC into afqmc/data
    python afqmc/download.py --model hfl/chinese-roberta-wwm-ext

Weights go to the Hugging Face cache (HF_HOME moves it, HF_ENDPOINT names a mirror), data into data_dir.
"""

import os
import sys
import zipfile
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from huggingface_hub import snapshot_download
from torch.hub import download_url_to_file

from afqmc.cli import run_script
from afqmc.config import Config
from afqmc.dataset import read_pairs
from afqmc.model import build_model, find_tokenizer
from common.checkpoint import ROOT, UserError

DATA_URL = "https://storage.googleapis.com/cluebenchmark/tasks/afqmc_public.zip"
ROWS = {"train.json": 34_334, "dev.json": 4_316, "test.json": 3_861}  # CLUE, arXiv 2004.05986, table 1
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the first that the model has; never both


def fetch_weights(config: Config) -> Path:
    """The folder in the hub's cache that holds tokenizer, config and weights, complete and loadable."""
    try:
        folder = Path(snapshot_download(config.model, allow_patterns=["*.json", "*.txt", "*.model"]))
        for pattern in WEIGHTS:
            folder = Path(snapshot_download(config.model, allow_patterns=[pattern]))
            if any(folder.glob(pattern)):
                break
    except (OSError, ValueError) as error:  # the hub's own errors are one or the other
        raise UserError(f"model {config.model} could not be fetched: {error}") from error
    pretrained = config.model_copy(update={"init": "pretrained"})
    find_tokenizer(pretrained)  # both raise where a file or a weight is missing
    build_model(pretrained)
    return folder


def check_rows(path: Path) -> None:
    """Read a file, so that a damaged one is found now, and one that is not AFQMC's."""
    count = len(read_pairs(path, labelled=path.name != "test.json"))
    if count != ROWS[path.name]:
        raise UserError(f"{path} has {count} pairs, AFQMC has {ROWS[path.name]}: give another --data_dir")


def fetch_data(folder: Path) -> None:
    """Put AFQMC's three files into folder; those that are there are only checked, before anything is written."""
    missing = [name for name in ROWS if not (folder / name).exists()]
    for name in ROWS.keys() - missing:
        check_rows(folder / name)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / "afqmc_public.zip"
    try:
        download_url_to_file(DATA_URL, str(archive), progress=sys.stderr.isatty())
        with zipfile.ZipFile(archive) as zipped:
            members = {Path(member).name: member for member in zipped.namelist()}
            for name in missing:
                (folder / f"{name}.tmp").write_bytes(zipped.read(members[name]))  # read checks the CRC
                os.replace(folder / f"{name}.tmp", folder / name)
                check_rows(folder / name)
    except OSError as error:
        raise UserError(f"{DATA_URL} could not be fetched: {error}") from error
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{DATA_URL} gave a damaged archive: {error}") from error
    finally:
        archive.unlink(missing_ok=True)


def main(config: Config) -> None:
    if (ROOT / config.model).is_dir():
        print(f"weights: {config.model} is a folder on this machine, nothing to fetch")
    else:
        print(f"weights: {config.model} is complete in {fetch_weights(config)}")
    fetch_data(ROOT / config.data_dir)
    counts = ", ".join(f"{name} {count:,}" for name, count in ROWS.items())
    print(f"data: {counts} pairs, complete in {ROOT / config.data_dir}")


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
