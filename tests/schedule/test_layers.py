"""The rooms of the package and who may enter them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_bfpp

PACKAGE = Path(megatron_bfpp.__file__).parent
SHARED = {"megatron_bfpp", "megatron_bfpp.errors", "megatron_bfpp.files"}  # the version, the errors, whole files

# Room: what a module of it may import beside the standard library, its own room and SHARED.
# Whoever is not listed here is an entry point, and may import what it needs.
ROOMS = {
    "schedule": set(),
    "runtime": {"megatron_bfpp.schedule", "torch"},
    "emulate": {"megatron_bfpp.schedule", "torch"},  # schedule: how transfers share a card
    "integration": {  # report: a traced run draws its own timeline
        *("megatron_bfpp.report", "megatron_bfpp.schedule", "megatron_bfpp.runtime", "megatron_bfpp.emulate", "torch", "numpy", "yaml", "megatron"),
    },
    "estimate": {"megatron_bfpp.schedule", "yaml", "matplotlib"},
    "report": {"megatron_bfpp.schedule", "matplotlib", "rich", "scipy"},
}
MAY_IMPORT_MEGATRON = {"integration", "run.py", "pretrain_gpt.py", "data.py", "cli.py"}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


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


def is_in(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def imports_of(path: Path) -> set[str]:
    package = ".".join(["megatron_bfpp", *path.parts[:-1]])
    return imported((PACKAGE / path).read_text(encoding="utf-8"), package)


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


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] in ROOMS], ids=str)
def test_a_module_imports_only_what_its_room_may(path):
    room = path.parts[0]
    allowed = {*sys.stdlib_module_names, *ROOMS[room], f"megatron_bfpp.{room}"}
    others = {"megatron_bfpp." + other.parts[0].removesuffix(".py") for other in MODULES} - SHARED
    for name in imports_of(path):
        shared = is_in(name, SHARED) and not is_in(name, others)
        assert shared and room != "schedule" or is_in(name, allowed), f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_integration_and_the_entry_points_import_megatron(path):
    if any(is_in(name, {"megatron"}) for name in imports_of(path)):
        assert path.parts[0] in MAY_IMPORT_MEGATRON


def test_a_step_is_planned_and_shown_without_torch_numpy_and_megatron():
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'yaml', 'megatron'): sys.modules[name] = None\n"
        "from megatron_bfpp.schedule import PipelineShape, breadth_first, check, lower, simulate\n"
        "shape = PipelineShape(4, 2, 8)\n"
        "plan = lower(breadth_first(shape), shape)\n"
        "check(plan, shape)\n"
        "assert simulate(plan, shape).step_time == 57\n"
        "import megatron_bfpp.cli\n"
        "sys.exit(megatron_bfpp.cli.main(['show', '--pp', '2', '--chunks', '2', '--microbatches', '2']))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
