"""The pictures of planned steps: what is drawn, and the files of docs/images from their own commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_bfpp.cli import main
from megatron_bfpp.schedule.names import SCHEDULES

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
COMMANDS = re.findall(r"^(?:bfpp|python) .*docs/images/.*$", (IMAGES / "README.md").read_text(), re.MULTILINE)
SHOW = [
    "show",
    "--pp",
    "4",
    "--chunks",
    "2",
    "--microbatches",
    "8",
    "--order",
    "interleaved",
    "--order",
    "breadth-first",
]


def drawn(tmp_path, *flags):
    path = tmp_path / "picture.svg"
    assert main([*SHOW, *flags, "--svg", str(path)]) == 0
    return list(ElementTree.parse(path).getroot().iter())


def of_kind(nodes, kind):
    return [node for node in nodes if node.get("class") == kind]


def words(nodes):
    return [node.text for node in nodes if node.tag.endswith("}text")]


def test_every_picture_of_the_documentation_has_a_command():
    made = {Path(shlex.split(command)[-1]).name for command in COMMANDS}
    assert made == {path.name for path in IMAGES.glob("*.svg")} and "timeline.svg" in made


@pytest.mark.parametrize("command", COMMANDS)
def test_a_picture_of_the_documentation_is_what_its_command_makes(command, tmp_path):
    program, *arguments, kept = shlex.split(command)
    again = str(tmp_path / "again.svg")
    if program == "bfpp":
        assert main([*arguments, again]) == 0
    else:
        subprocess.run([sys.executable, *arguments, again], cwd=ROOT, check=True, capture_output=True)
    assert Path(again).read_bytes() == (ROOT / kept).read_bytes()


def test_the_bars_are_of_the_one_table_and_breadth_first_reaches_the_lower_bound():
    nodes = list(ElementTree.parse(IMAGES / "when.svg").getroot().iter())
    bars = [(*node[0].text.split(": "), node.get("fill")) for node in of_kind(nodes, "bar")]
    assert len(bars) == 5 * 4
    for word, more, color in bars:
        assert SCHEDULES[word].color == color and 0 <= float(more.rstrip("%")) < 100
    assert {more for word, more, _ in bars if word == "breadth-first"} == {"0.0%"}
    assert [more for word, more, _ in bars if word == "interleaved"] == ["0.0%", "10.9%", "14.4%", "24.2%", "10.0%"]


def test_messages_and_reductions_that_take_time_are_drawn_as_such(tmp_path):
    nodes = drawn(tmp_path, "--hop", "0.5", "--reduction", "16")
    links = [node for node in of_kind(nodes, "message") if node.get("d").count("M") > 1]
    assert [node.get("d").count("M") for node in links] == [7 * 8 * 2] * 2  # stage boundaries, micro-batches, F and B
    reductions = of_kind(nodes, "reduction")
    assert len(reductions) == 2 * 4 * 2  # orders, ranks, chunks
    assert words(nodes).count("reduction, chunk 1") == 2 * 4
    assert "message" in words(nodes) and "reduction of a chunk's gradients" in words(nodes)
    first = next(node for node in reductions if node[0].text.startswith("reduction, chunk 1"))
    scale = float(first.get("width")) / 16
    assert all(float(node.get("width")) == pytest.approx(16 * scale, abs=0.11) for node in reductions)  # one time scale


@pytest.mark.parametrize("flag, library", [("--png", "matplotlib"), ("--html", "jinja2")])
def test_a_missing_library_is_named_before_the_work(flag, library, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    assert main([*SHOW, flag, str(tmp_path / "picture"), "--svg", str(tmp_path / "picture.svg")]) == 2
    said = capsys.readouterr()
    assert f"{flag} needs {library}, which is not installed" in said.err and "pip install" in said.err
    assert not said.out and not list(tmp_path.iterdir())


def test_what_takes_no_time_is_not_drawn(tmp_path):
    nodes = drawn(tmp_path)
    assert not of_kind(nodes, "message") and not of_kind(nodes, "reduction") and "message" not in words(nodes)


def test_a_gather_is_drawn_where_it_runs(tmp_path):
    assert len(of_kind(drawn(tmp_path, "--gather", "4"), "gather")) == 2 * 4 * 2


def test_a_title_has_the_step_and_how_much_shorter_it_is_than_the_first(tmp_path):
    shown = words(drawn(tmp_path, "--hop", "0.5", "--reduction", "16"))
    assert "interleaved: step 86 forward units, bubble 44.2%" in shown
    assert "breadth-first: step 76 forward units, bubble 36.8%, 11.6% shorter than interleaved" in shown
    assert "breadth-first: step 57 forward units, bubble 15.8%, as long as interleaved" in words(drawn(tmp_path))


def test_what_was_assumed_stands_in_the_picture(tmp_path):
    shown = " ".join(words(drawn(tmp_path, "--hop", "0.5", "--transfer", "0.25", "--gather", "3", "--reduction", "16")))
    for part in (
        "Planned, not measured.",
        "latency of a message 0.5",
        "transfer 0.25",
        "gather of a chunk 3",
        "reduction of a chunk 16",
        "backward 2",
    ):
        assert part in shown


def test_the_colour_of_a_schedule_is_that_of_the_one_table(tmp_path):
    marks = [node.get("fill") for node in of_kind(drawn(tmp_path), "schedule")]
    assert marks == [SCHEDULES["interleaved"].color, SCHEDULES["breadth-first"].color]


def test_a_picture_brings_its_dark_colours_and_asks_for_no_font(tmp_path):
    (style,) = [node.text for node in drawn(tmp_path) if node.tag.endswith("}style")]
    assert "@media (prefers-color-scheme: dark)" in style
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
