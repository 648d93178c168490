"""Runs (run.py, progress.py, identity.py, environment.py), pretrained models (pretrained.py, probe.py, spm.py), files
(files.py) and their rows (rows.py)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository: what relative paths in a config are relative to


class UserError(Exception):
    """Something that the user can mend, said in one line."""
