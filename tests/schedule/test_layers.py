"""The rooms of the package and who may enter them."""

import ast
import subprocess
import sys
from pathlib import Path

import megatron_bfpp

PACKAGE = Path(megatron_bfpp.__file__).parent
BLOCKED = {
    "schedule": {"torch", "numpy", "yaml", "megatron", "runtime", "integration", "report"},
    "runtime": {"megatron", "integration", "report"},
    "report": {"torch", "megatron", "runtime", "integration"},
}


def test_a_step_is_planned_without_torch_numpy_and_megatron():
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'yaml', 'megatron'): sys.modules[name] = None\n"
        "from megatron_bfpp.schedule import PipelineShape, breadth_first, check, lower, simulate\n"
        "shape = PipelineShape(4, 2, 8)\n"
        "check(lower(breadth_first(shape), shape), shape)\n"
        "import megatron_bfpp.cli\n"
        "sys.exit(megatron_bfpp.cli.main(['show', '--pp', '2', '--chunks', '2', '--microbatches', '2']))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_imports_respect_the_rooms():
    for room, blocked in BLOCKED.items():
        for path in (PACKAGE / room).rglob("*.py"):
            assert not imported(path) & blocked, path


def test_only_integration_and_the_entry_points_import_megatron():
    for path in PACKAGE.rglob("*.py"):
        if "megatron" in imported(path):
            name = path.relative_to(PACKAGE).as_posix()
            assert name.startswith("integration/") or name in ("pretrain_gpt.py", "data.py"), name


def imported(path: Path) -> set[str]:
    """First names of absolute imports and of the package's own rooms, lazy ones included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            words = (node.module or "").split(".")
            own = node.level > 1 or words[0] == "megatron_bfpp"
            names |= {words[1] if own and words[0] == "megatron_bfpp" and len(words) > 1 else words[0]}
    return names
