"""One table of schedules: the same word and colour for the same schedule in every command, picture and page."""

import ast
import re
from pathlib import Path

import ab_runs
import pytest

import megatron_bfpp
from megatron_bfpp.ab.job import ARMS
from megatron_bfpp.bench import plot, results
from megatron_bfpp.bench.case import Case
from megatron_bfpp.bench.results import Result
from megatron_bfpp.cli import main
from megatron_bfpp.schedule import PipelineShape
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.schedule.names import ORDERS, SCHEDULES

PACKAGE = Path(megatron_bfpp.__file__).parent
TABLE = PACKAGE / "schedule/names.py"
COLORS = {each.color.lower() for each in SCHEDULES.values()}


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != TABLE]


def test_no_colour_of_a_schedule_stands_outside_the_table():
    for path in modules():
        found = {color.lower() for color in re.findall(r"#[0-9a-fA-F]{6}\b", path.read_text(encoding="utf-8"))}
        assert not found & COLORS, path


def test_no_second_list_of_schedules_stands_outside_the_table():
    """A literal list, tuple, set or dict with three of the words is one. The bench's arms are code, one per word."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            words = {each.value for each in items if isinstance(each, ast.Constant)} & set(SCHEDULES)
            assert len(words) < 3 or path == PACKAGE / "bench/arms.py", (path, node.lineno, words)


def test_the_arms_of_the_bench_are_the_table():
    source = ast.parse((PACKAGE / "bench/arms.py").read_text(encoding="utf-8"))
    dicts = [[key.value for key in node.keys if isinstance(key, ast.Constant)] for node in ast.walk(source)
             if isinstance(node, ast.Dict)]  # fmt: skip
    assert list(SCHEDULES) in dicts
    assert Case(PipelineShape(2, 1, 1)).arms == tuple(SCHEDULES)
    assert results.REFERENCE in SCHEDULES and set(ORDERS) < set(SCHEDULES)


def test_the_picture_of_the_bench_has_the_colours_of_the_table(tmp_path):
    pytest.importorskip("matplotlib")
    shape, costs = PipelineShape(2, 2, 4), Costs()
    path = tmp_path / "bench.svg"
    plot.plot([Result(arm, Case(shape, costs), [10.0 + index]) for index, arm in enumerate(SCHEDULES)], str(path))
    picture = path.read_text(encoding="utf-8").lower()
    assert all(color in picture for color in COLORS)


def test_the_arms_of_the_ab_are_words_of_the_table():
    assert set(ARMS) <= set(SCHEDULES) and all(SCHEDULES[word].flags for word in ARMS)


def test_the_page_of_compare_has_the_colours_of_the_table(tmp_path):
    runs = [str(path) for path in ab_runs.two_arms(tmp_path)]
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--force", "--html", str(page)]) in (0, 1)
    arms = {Path(run).name.split(".")[0] for run in runs} & set(SCHEDULES)
    assert len(arms) > 1 and all(SCHEDULES[arm].color in page.read_text(encoding="utf-8") for arm in arms)
