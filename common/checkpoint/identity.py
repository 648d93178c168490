"""What a run was made from, told by content and not by place: its data files, its pretrained model."""

import hashlib
from functools import cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from common.checkpoint import ROOT, UserError

MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")  # suffixes of config, tokenizer and weights


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


@cache
def digest_once(path: Path, size: int, mtime_ns: int) -> str:
    """file_digest, of a file that a process asks for several times."""
    return file_digest(path)


def differences(there: dict[str, str], here: dict[str, str]) -> str:
    """In which files two sets of digests differ, in words; "" where they are equal."""
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    kinds = ["is gone" if name not in here else "is new" if name not in there else "has changed" for name in names]
    return ", ".join(map("{} {}".format, names, kinds))


def model_folder(model: str) -> Path | None:
    """The folder of a pretrained model: a path, or a name on the hub that this machine's cache has; else None."""
    if (ROOT / model).is_dir():
        return ROOT / model
    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError:  # not a name that the hub could have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def identify_model(folder: Path, recorded: dict | None = None) -> dict:
    """The path and, for each file, [SHA-256, size, mtime in ns]; a file that is there as recorded is not read."""
    path, known = folder.resolve(), {}
    path = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
    if recorded and recorded["path"] == path:
        known = {(name, *rest): digest for name, (digest, *rest) in recorded["files"].items()}
    files = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in MODEL_FILES and file.is_file():
            status = file.stat()
            rest = [status.st_size, status.st_mtime_ns]
            files[file.name] = [known.get((file.name, *rest)) or digest_once(file, *rest), *rest]
    return {"path": path, "files": files}
