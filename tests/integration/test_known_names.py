"""The table of what the code reads whose place the plugin takes is what the releases of Megatron read."""

import importlib.util
import os
from pathlib import Path

import pytest

from megatron_bfpp.integration.relied_on import LAST, is_tested, release
from megatron_bfpp.integration.relied_on.known import NAMES, known

SCRIPT = Path(__file__).parents[2] / "scripts" / "known_names.py"


def script():
    spec = importlib.util.spec_from_file_location("known_names", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(name: str) -> dict[str, frozenset[str]]:
    return {place: dict(known(*place.split(":")))[name] for place in NAMES}


@pytest.mark.slow
def test_the_table_has_the_names_that_the_installed_release_reads():
    number = release()
    entries = [name for name, _ in known(*next(iter(NAMES)).split(":"))]
    minor = ".".join(number.split(".")[:2])
    name = next((each for each in entries if each.startswith(minor)), entries[-1])
    assert is_tested() or number > f"{LAST[0]}.{LAST[1]}"
    assert {place: frozenset(names) for place, names in script().read("").items()} == recorded(name)


@pytest.mark.slow
def test_the_table_is_what_the_script_makes_of_unpacked_releases():
    """BFPP_MEGATRONS="0.17.1=/path main,d98e8a64=/path": the script's words, with commas for the blanks in names."""
    given = os.environ.get("BFPP_MEGATRONS")
    if not given:
        pytest.skip("BFPP_MEGATRONS names no folders with unpacked releases of megatron-core")
    for each in given.split():
        name, folder = each.replace(",", " ").split("=", 1)
        assert {place: frozenset(names) for place, names in script().read(folder).items()} == recorded(name)
