"""Imports between the rooms of the package run downward, in no circle, and few rooms import torch or Megatron."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import megatron_bfpp
from megatron_bfpp.cli import WORDS

PACKAGE = Path(megatron_bfpp.__file__).parent
MODULES = {
    ".".join(["megatron_bfpp", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the ground up. A room imports rooms that stand below it here, and no other.
FLOORS = (
    {"console"},
    {"schedule"},
    {"runtime"},
    {"timeline"},
    {"integration"},
    {"planner", "compare"},
    {"bench", "check", "doctor", "ab"},
    {"__init__"},
    {"run"},
    {"pretrain_gpt", "pretrain_hybrid", "data", "config_file", "cli"},
)
FLOORS_OF_INTEGRATION = (
    {"seams"},
    {"imports", "relied_on"},
    {"flags"},
    {"process"},
    {"cpu", "gpt"},
    {"step", "reliability"},
    {"observe"},
    {"validation"},
    {"activation"},
)
WITHOUT_TORCH = ("console", "schedule", "timeline", "planner", "compare", "ab")
MAY_IMPORT_MEGATRON = (
    "integration",
    "bench",
    "check",
    "doctor",
    "data",
)  # the last four lazily or in processes of their own
MOST_FILES, MOST_ROOMS, MOST_ARROWS = 15, 20, 50


def imported(source: str, package: str) -> set[str]:
    """Every name that `source`, a module in `package`, imports: lazily too, relative names made absolute."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from megatron_bfpp import runtime` imports a room without naming it as one.
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@cache
def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    by_name = {f"megatron_bfpp.{word}" for word in WORDS.values()} if module == "megatron_bfpp.cli" else set()
    return imported(path.read_text(encoding="utf-8"), package) | by_name


def module_of(name: str) -> str | None:
    """The module of the package that an imported name is, or stands in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def room_of(module: str, house: str) -> str | None:
    """The file or folder of `house` that holds a module; None outside it."""
    if module == house:
        return "__init__"
    return module.removeprefix(house + ".").split(".")[0] if module.startswith(house + ".") else None


def arrows(house: str) -> dict[tuple[str, str], list[str]]:
    """(room, the room that it imports) -> the imports."""
    found: dict[tuple[str, str], list[str]] = {}
    for module in MODULES:
        for name in imports_of(module):
            target = module_of(name)
            ends = room_of(module, house), None if target is None else room_of(target, house)
            if None not in ends and ends[0] != ends[1]:
                found.setdefault(ends, []).append(f"{module} imports {name}")
    return found


def test_imports_are_found_in_every_form():
    lazy = "def f():\n    from ..runtime import p2p\n    from .. import report\n"
    source = f"import torch.nn as nn\nfrom .ir import Op\n{lazy}"
    assert imported(source, "megatron_bfpp.schedule") == {
        "torch.nn",
        "megatron_bfpp.runtime.p2p",
        "megatron_bfpp.report",
        "megatron_bfpp.schedule.ir.Op",
    }
    assert imported("from megatron_bfpp import runtime", "megatron_bfpp") == {"megatron_bfpp.runtime"}


@pytest.mark.parametrize(
    "house, floors", [("megatron_bfpp", FLOORS), ("megatron_bfpp.integration", FLOORS_OF_INTEGRATION)]
)
def test_every_import_runs_downward(house, floors):
    floor_of = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
    for (room, target), imports in arrows(house).items():
        assert floor_of[target] < floor_of[room], f"up: {imports[0]}"
    assert {room_of(module, house) for module in MODULES} - {None, "__init__"} == set(floor_of) - {"__init__"}


def test_no_files_import_each_other_in_a_circle():
    # The package's own __init__ hands out what activation does, lazily; whoever imports a submodule runs it first.
    sorter = TopologicalSorter(
        {module: {module_of(name) for name in imports_of(module)} - {None, module} for module in MODULES}
    )
    sorter.prepare()  # CycleError names the files


def test_the_house_is_small_enough_to_keep_in_mind():
    found = arrows("megatron_bfpp")
    assert len({room for ends in found for room in ends}) <= MOST_ROOMS
    assert len(found) <= MOST_ARROWS
    for folder in {path.parent for path in MODULES.values()}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


@pytest.mark.parametrize("module", MODULES)
def test_few_rooms_import_torch_or_megatron(module):
    room, names = room_of(module, "megatron_bfpp"), {name.split(".")[0] for name in imports_of(module)}
    if room in WITHOUT_TORCH:
        assert not names & {"torch", "megatron"}
    if "megatron" in names:
        assert room in MAY_IMPORT_MEGATRON


def test_a_step_is_planned_and_shown_without_torch_numpy_and_megatron():
    rooms = sorted(
        module for module in MODULES if room_of(module, "megatron_bfpp") in ("schedule", "timeline", "compare")
    )
    code = (
        "import importlib, sys\n"
        "for name in ('torch', 'numpy', 'yaml', 'megatron'): sys.modules[name] = None\n"
        "from megatron_bfpp.schedule import PipelineShape, breadth_first, check, lower, simulate\n"
        "shape = PipelineShape(4, 2, 8)\n"
        "plan = lower(breadth_first(shape), shape)\n"
        "check(plan, shape)\n"
        "assert simulate(plan, shape).step_time == 57\n"
        "import megatron_bfpp.cli\n"
        f"for name in {rooms}: importlib.import_module(name)\n"
        "sys.exit(megatron_bfpp.cli.main(['show', '--pp', '2', '--chunks', '2', '--microbatches', '2']))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
