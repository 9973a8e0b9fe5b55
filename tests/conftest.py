"""Markers of tests: `slow` starts processes of ranks or takes more than about 2 s; `tour` is a part of these.

bash scripts/test.sh runs "not slow", then "tour" (the tests that tour.py names); `--all` runs everything.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: many processes on few cores
sys.path.insert(0, str(Path(__file__).parent / "support"))  # for the processes that tests fork, too

from tour import TOUR

COLLECTED = pytest.StashKey[dict[str, bool]]()  # test -> whether it is slow, of all tests before any is deselected


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(config, items):
    tour = {name for names in TOUR.values() for name in names}
    for item in items:
        if item.nodeid in tour:
            item.add_marker(pytest.mark.tour)
    config.stash[COLLECTED] = {item.nodeid: item.get_closest_marker("slow") is not None for item in items}


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, whose workers are given the tests' names as arguments
def pytest_configure_node(node):
    node.workerinput["is_part"] = node.config.args_source is pytest.Config.ArgsSource.ARGS


@pytest.fixture(scope="session")
def collected(pytestconfig) -> dict[str, bool]:
    """Every collected test, and whether it is slow. Skips where only a part of tests/ was asked for."""
    given = pytestconfig.args_source is pytest.Config.ArgsSource.ARGS
    if getattr(pytestconfig, "workerinput", {}).get("is_part", given):
        pytest.skip("needs a run of all directories")
    return pytestconfig.stash[COLLECTED]
