"""Lines of files as rows, with what every reader here refuses, and when two texts are the same."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from common.checkpoint import UserError
from common.checkpoint.files import first_repeated, unread_keys
from common.checkpoint.rows import NO_NAME, decode
from common.checkpoint.texts import is_empty


class Triplet(NamedTuple):
    """A text, one that means the same, follows or answers, any number that do not, and where they stand."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    line: int

    @property
    def texts(self) -> tuple[str, ...]:
        return self.anchor, self.positive, *self.negatives


class Pair(NamedTuple):
    """Two texts, people's score of how alike they are, and where they stand."""

    sentence1: str
    sentence2: str
    score: float
    line: int


def normalize(text: str) -> str:
    """A text with single spaces."""
    return " ".join(text.split())


def filled(value: object) -> str:
    if not isinstance(value, str) or is_empty(value):
        raise ValueError("expected a non-empty string")
    return value


NEAR = ("hard_negative", "hard_neg", "neg")  # what some call a negative, which nobody reads under these names
Text = Annotated[str, BeforeValidator(filled)]
Row = TypeVar("Row", bound=BaseModel)


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and text of every line, with its end. Raises UserError for what is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, decode(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and text of each line that is not blank. Raises UserError."""
    for number, text in decoded_lines(path):
        if not is_empty(text):
            yield number, text.rstrip("\r\n")


def parse_row(schema: type[Row], path: Path, number: int, row: dict, unread: Counter[str]) -> Row:
    """A row as the schema's; keys that nobody reads are counted.

    Raises UserError naming file, line, value and what was expected.
    """
    known = [field.alias or name for name, field in schema.model_fields.items()]
    try:
        unread.update(unread_keys(row, known, NEAR))
        return schema.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}") from error
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if first["type"] == "missing":
        reason = f"has no {first['loc'][0]!r}, only {', '.join(map(repr, first['input'])) or 'nothing'}"
    else:
        reason = f"{first['loc'][0]} is {first['input']!r:.60}, {message}"
    raise UserError(f"{path}, line {number}: {reason}")


def read_header(path: Path, number: int, header: list[str], known: tuple[str, ...]) -> tuple[list[int], list[str]]:
    """Where the known columns stand, and the columns that nobody reads. Raises UserError naming file and line."""
    try:
        if repeated := first_repeated([name for name in header if name]):
            raise ValueError(f"the column {repeated!r} stands there twice")
        return [header.index(name) for name in known], [n or NO_NAME for n in unread_keys(header, known, NEAR)]
    except ValueError as error:
        raise UserError(f"{path}, line {number}: {error}") from error
