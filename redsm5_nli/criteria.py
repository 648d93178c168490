"""The criteria that a post is matched with: DSM-5, major depressive episode, A.1 to A.9, in this project's words."""

import json
from pathlib import Path
from typing import NamedTuple

from redsm5_nli.config import UserError

SPECIAL_CASE = "SPECIAL_CASE"  # ReDSM5's label for what an expert marked but is none of the nine


class Criterion(NamedTuple):
    """id: the name in the annotations' DSM5_symptom column; name and description: what the model reads."""

    id: str
    name: str
    description: str

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


def load_criteria(path: Path | None = None) -> tuple[Criterion, ...]:
    """The nine criteria, or those of a JSON file: a list of {"id": ..., "name": ..., "description": ...}.

    Raises UserError for a file that is not such a list, an empty or repeated id, and a missing or empty text.
    """
    if path is None:
        return CRITERIA
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path} not found: criteria_file is a JSON list of criteria, empty means DSM-5's") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return parse_criteria(rows, path)


def parse_criteria(rows: object, path: Path) -> tuple[Criterion, ...]:
    """The criteria of a JSON value; path is named in the UserError where they are not what load_criteria says."""
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of criteria, each with {', '.join(Criterion._fields)}")
    criteria: dict[str, Criterion] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or row.keys() != set(Criterion._fields):
            raise UserError(f"{path}, criterion {number}: expected exactly {', '.join(Criterion._fields)}")
        for name in Criterion._fields:
            if not isinstance(row[name], str) or not row[name].strip():
                raise UserError(f"{path}, criterion {number}: {name} is {row[name]!r}, expected a non-empty string")
        criterion = Criterion(*(row[name].strip() for name in Criterion._fields))
        if criterion.id in criteria or criterion.id == SPECIAL_CASE:
            raise UserError(f"{path}, criterion {number}: id {criterion.id} is taken")
        criteria[criterion.id] = criterion
    return tuple(criteria.values())
