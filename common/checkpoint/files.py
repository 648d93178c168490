"""Files that a kill or a full disk never leaves half written, and what every reader of rows refuses."""

import errno
import json
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from common.checkpoint import UserError


def flush(path: Path) -> None:
    """Wait until the disk holds a file, or a folder's list of names where the system can be asked for that."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems' answer
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let write fill a temporary file, flush it and rename it to path: path is the old file or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        raise UserError(f"could not write {path} ({error}); what was there is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8; what is none, as a path can be, is escaped."""
    content = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: dict | list) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError when the file is missing, damaged or holds something else, or a key twice."""
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def parse_object(text: str) -> dict:
    """A JSON object.

    Raises ValueError for what is none, for a key that stands twice (which one would count?), and for half of a
    surrogate pair, which JSON can hold but no text.
    """
    try:
        row = DECODER.decode(text)
        if "\\ud" in text.lower():
            json.dumps(row, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, found {text[:40]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    return row


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    if len(row := dict(pairs)) < len(pairs):
        repeated = first_repeated([key for key, _ in pairs])
        raise ValueError(f"{repeated!r} stands twice in {json.dumps(row)[:80]}")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)  # json.loads would make one for each line


def first_repeated(names: list[str]) -> str | None:
    """The first of the keys or columns that stands there again."""
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


def unread_keys(keys: Iterable[str], known: Collection[str], near: Collection[str] = ()) -> list[str]:
    """The keys or columns of a row that nobody reads, for the data table to count.

    Raises ValueError for one that is a known key, or one of near, but for case, plural or number: a mistyped key would
    be left out in silence.
    """
    unread = [key for key in keys if key not in known]
    stems = {stem(key) for key in (*known, *near)} if unread else set()
    if mistyped := [key for key in unread if stem(key) in stems]:
        raise ValueError(f"nobody reads the key {mistyped[0]!r}; known are {', '.join(known)}")
    return unread


def stem(key: str) -> str:
    """A key without case, number and plural: hard_negatives, Hard-Negative, hard_negative_1 are one. id is not _id."""
    key = unicodedata.normalize("NFKC", key).casefold().strip()
    return re.sub(r"(?<!^)[\W\d_]", "", key).rstrip("es")
