"""The criteria that a post is matched with: DSM-5, major depressive episode, A.1 to A.9, in this project's words."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, ValidationError

from common.checkpoint import ROOT, UserError
from common.checkpoint.files import unique_keys, unread_keys
from common.checkpoint.texts import is_empty

SPECIAL_CASE = "SPECIAL_CASE"  # ReDSM5's label for what an expert marked but is none of the nine


def refuse_empty(text: str) -> str:
    if is_empty(text):
        raise ValueError("is empty")
    return text


Text = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(refuse_empty)]


class Criterion(NamedTuple):
    """id: the name in the annotations' DSM5_symptom column; name and description: what the model reads."""

    id: Text
    name: Text
    description: Text

    @property
    def text(self) -> str:
        return f"{self.name}: {self.description}"


CRITERIA = (
    Criterion("DEPRESSED_MOOD", "Depressed mood", "feeling sad, empty, hopeless or close to tears most of the day."),
    Criterion("ANHEDONIA", "Loss of interest", "hardly any interest or pleasure in things that used to be enjoyed."),
    Criterion("APPETITE_CHANGE", "Appetite", "eating much less or more than usual, or a clear change of weight."),
    Criterion("SLEEP_ISSUES", "Sleep", "trouble falling or staying asleep, or sleeping far too much, most days."),
    Criterion("PSYCHOMOTOR", "Movement", "moving or talking so slowly, or so restlessly, that others notice."),
    Criterion("FATIGUE", "Fatigue", "tired and without energy nearly every day; small tasks are exhausting."),
    Criterion("WORTHLESSNESS", "Worthlessness", "feeling worthless, or guilty and to blame far more than is fair."),
    Criterion("COGNITIVE_ISSUES", "Concentration", "finding it hard to think, to concentrate or to make decisions."),
    Criterion("SUICIDAL_THOUGHTS", "Thoughts of death", "thinking again and again of death or of ending one's life."),
)
CRITERIA_FILE = TypeAdapter(Annotated[tuple[Criterion, ...], Field(min_length=1)])


def load_criteria(file: str | Path) -> tuple[Criterion, ...]:
    """The nine criteria, or those of a JSON file: a list of {"id": ..., "name": ..., "description": ...}.

    A run's criteria.json, {"criteria": the list}, does as well. Raises UserError naming the file where it is missing or
    not JSON, for a missing or empty text, for a repeated id, and for a key that is not expected or stands twice.
    """
    if not file:
        return CRITERIA
    path = ROOT / file
    if not path.exists():
        raise UserError(f"{path} not found: criteria_file is a JSON list of criteria, empty means DSM-5's")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        if isinstance(rows, dict):
            if rows.keys() != {"criteria"}:
                raise ValueError(f"expected a list, or an object of one key, criteria, found {', '.join(rows)}")
            rows = rows["criteria"]
        for row in rows if isinstance(rows, list) else ():
            unread_keys(row if isinstance(row, dict) else (), Criterion._fields)
        criteria = CRITERIA_FILE.validate_python(rows)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))  # such as 0.name
        raise UserError(f"{path}: {place} {first['msg']}, found {first['input']!r}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    ids = Counter([SPECIAL_CASE, *(criterion.id for criterion in criteria)])
    if ids.most_common(1)[0][1] > 1:
        raise UserError(f"{path}: the id {ids.most_common(1)[0][0]} is taken")
    return criteria
