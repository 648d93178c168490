"""The tests are of the CPU, also where there is a GPU, with one thread: on a busy machine two are slower."""

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from launch import train_short, write_few_rows

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before the first look for a GPU; the scripts that tests start inherit it
# Where the weights are on the machine the tests must not find them: some tell what is missing.
os.environ |= dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"), tempfile.mkdtemp())
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also the tests that take long: kills, full disks, READMEs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in {*slow}]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)  # what a test draws depends on no test before it


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory) -> Callable[[str], Path]:
    """A function: a folder with some rows of a project's sample, in its files. To be copied before it is changed."""
    return cache(lambda project: write_few_rows(project, tmp_path_factory.mktemp("data") / project))


@pytest.fixture(scope="session")
def short_run(few_rows, tmp_path_factory) -> Callable[[str], Path]:
    """A function: a finished run of a project of 6 steps over few_rows. To be copied as well."""
    return cache(lambda project: train_short(project, few_rows(project), tmp_path_factory.mktemp("elsewhere")))
