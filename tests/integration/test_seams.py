"""Each place that the plugin relies on, damaged in turn: one line that names it, before a model is built."""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from damage import damage, gone, kinds
from megatron.core.pipeline_parallel import schedules

from megatron_bfpp.console.errors import UserError, shown
from megatron_bfpp.integration import relied_on
from megatron_bfpp.integration.seams import Seam


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")[:2]))


FIT = tuple(part for part in relied_on.PARTS if number(part.first_torch) <= number(torch.__version__))
EVERY = [
    pytest.param(part, seam, kind, id=f"{part.name}-{seam.path}-{kind}".replace(" ", "_"))
    for part in FIT
    for seam in part.seams
    for kind in kinds(seam)
]


@pytest.fixture
def patch(monkeypatch):
    """Return a function that changes an attribute, or an entry of a dictionary, until the test ends."""
    relied_on.forget()

    def change(owner, name, value):
        if isinstance(owner, dict):
            monkeypatch.setitem(owner, name, value)
        elif gone(value):
            monkeypatch.delattr(owner, name, raising=False)
        else:
            monkeypatch.setattr(owner, name, value, raising=False)

    yield change
    relied_on.forget()


def is_needed(seam: Seam) -> bool:
    return seam.only_if is None or seam.only_if[0]._knows(seam.only_if[1])


def test_every_seam_fits_this_megatron():
    answers = list(relied_on.answers())
    assert [answer.misfit for answer in answers if answer.misfit and answer.part in FIT] == []
    assert {answer.part for answer in answers if answer.misfit} == {*relied_on.PARTS} - {*FIT}, "refused for a reason"
    relied_on.check(*FIT)


def test_a_wrapper_that_takes_everything_fits(patch):
    """As others put around Megatron's functions, to time or to trace them."""
    forward_step = schedules.forward_step
    patch(schedules, "forward_step", lambda *args, **kwargs: forward_step(*args, **kwargs))
    relied_on.check(*FIT)
    patch(schedules, "forward_step", lambda model, **kwargs: forward_step(model, **kwargs))
    with pytest.raises(UserError, match="forward_step has no parameter forward_step_func, data_iterator, num_micro"):
        relied_on.forget()
        relied_on.check(*FIT)


@pytest.mark.parametrize("part, seam, kind", EVERY)
def test_a_damaged_seam_is_named_in_one_line(part, seam, kind, patch):
    if not is_needed(seam):
        pytest.skip("this release has no such place")
    said = damage(seam, kind, patch)
    with pytest.raises(UserError) as refusal:
        relied_on.check(part)
    line = str(refusal.value)
    assert "\n" not in line and shown(refusal.value) == line, "one line, shown whole"
    assert said in line and "Use a" in line
    library = "torch 2." if seam.module.startswith("torch") else f"megatron-core {relied_on.release()} does not fit: "
    assert line.startswith(library)


INTEGRATION = Path(relied_on.__file__).parents[1]


def references(files: Iterable[Path]) -> set[tuple[str, str]]:
    """(module or class, name) of all that this code imports from Megatron, or takes from an import."""
    found = set()
    for file in files:
        tree, bound = ast.parse(file.read_text(encoding="utf-8")), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("megatron."):
                for alias in node.names:
                    bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    found.add((node.module, alias.name))
            elif isinstance(node, ast.Import):
                bound |= {each.asname: each.name for each in node.names if each.asname and "megatron." in each.name}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
                found.add((bound[node.value.id], node.attr))
    return found


# What a package hands on, and what no row can be about.
HANDED_ON = {"megatron.core.mpu": "megatron.core.parallel_state"}
NEEDS_NO_ROW = {
    "megatron.core.datasets",
    "megatron.core.utils.MakeViewlessTensor.apply",  # torch's
    "megatron.core.package_info.__version__",
    "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda",  # Apex's, where it is there
}


def test_all_that_is_used_of_megatron_stands_in_the_table():
    seams = [seam for part in relied_on.PARTS for seam in part.seams]
    rows = {f"{module}.{seam.name}" for seam in seams for module in (seam.module, *seam.also_in)}
    # A module and a class are covered by the rows of what they hold.
    holders = {path.rpartition(".")[0] for path in rows} | {seam.module for seam in seams}
    named = references(INTEGRATION.rglob("*.py"))
    used = {f"{HANDED_ON.get(owner, owner)}.{name}" for owner, name in named if not name.startswith("__")}
    missing = sorted(used - rows - holders - NEEDS_NO_ROW)
    assert missing == [], "add rows to megatron_bfpp/integration/relied_on/: what is used of Megatron stands there"


def test_what_the_cpu_mode_imports_is_looked_at_before_it_is_imported():
    """It is switched on before a command line is read: rows of other parts are looked at too late."""
    looked_at = {module for seam in relied_on.CPU.seams for module in (seam.module, *seam.also_in)}
    files = [INTEGRATION / "cpu" / f"{name}.py" for name in ("cuda", "modules", "optimizer", "tensors")]
    named = {f"{owner}.{name}" for owner, name in references(files)} | {owner for owner, _ in references(files)}
    imported = {name for name in named if name in sys.modules and not hasattr(sys.modules[name], "__path__")}
    assert imported - looked_at == set()
