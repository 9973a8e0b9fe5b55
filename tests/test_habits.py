"""What every file of the repository keeps to: ruff, mypy, lengths, and a test of each room in the default run."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_rooms import FLOORS, PACKAGE
from tour import TOUR

ROOT = Path(__file__).parent.parent
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 300, 60
OURS = sorted(path for folder in (PACKAGE, ROOT / "scripts") for path in folder.rglob("*") if path.is_file())


def complaints(*command: str) -> str:
    """Run a tool of this environment at the root; return its output if it fails."""
    done = subprocess.run([sys.executable, "-m", *command], check=False, capture_output=True, text=True, cwd=ROOT)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff_finds_nothing():
    assert not complaints("ruff", "check", "--quiet", ".")


def test_everything_is_formatted():
    assert not complaints("ruff", "format", "--quiet", "--check", ".")


@pytest.mark.slow
def test_the_package_is_typed():
    assert not complaints("mypy", "megatron_bfpp")


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_bytes().splitlines()) for path in OURS}
    code = (".py", ".sh", ".sbatch")
    assert not {name: n for name, n in lengths.items() if name.endswith(code) and n > MOST_LINES_OF_A_FILE}


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them by that name: of two, the second is an error."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_function_is_long():
    long = [
        f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in OURS
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    ]
    assert not long, long


def test_every_room_has_a_test_in_the_default_run(collected):
    rooms = {room for floor in FLOORS for room in floor if (PACKAGE / room).is_dir()}
    tour = {name for names in TOUR.values() for name in names}
    default = {name for name, is_slow in collected.items() if not is_slow or name in tour}
    assert rooms == {room for room in rooms if any(name.startswith(f"tests/{room}/") for name in default)}


def test_the_tour_names_tests_that_are_there_and_slow(collected):
    tour = {name for names in TOUR.values() for name in names}
    assert tour <= {name for name, is_slow in collected.items() if is_slow}, tour - collected.keys()
