"""A trace is read back as what was measured: numbers, table, picture, and what is said of a damaged file."""

import json
from xml.etree import ElementTree

import pytest
from traces import document

from megatron_bfpp.cli import main
from megatron_bfpp.schedule import Op
from megatron_bfpp.timeline.measured import steps_of
from megatron_bfpp.timeline.picture import UNKNOWN


def written(tmp_path, content):
    path = tmp_path / "trace.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_busy_waits_and_bubble_are_those_of_the_notes():
    measured = steps_of(document())[20]
    assert measured.step_time == pytest.approx(100)
    assert measured.busy == pytest.approx([10 + 30, 16 + 28])  # 0B0 from 60 on; 1F0 from 12 on, less 2 for a gather
    assert measured.exposed_p2p == pytest.approx([49, 12])
    assert measured.exposed_dp == pytest.approx([10, 2])  # the launch at 90 contains a part of the wait
    assert measured.bubble_fraction == pytest.approx(1 - (40 + 44) / 200)
    assert measured.bubble_of(1) == pytest.approx(0.56)


def test_the_plan_is_simulated_with_the_measured_durations():
    planned = steps_of(document())[20].planned()
    forward, backward = (10 + 18) / 2, (30 + 28) / 2
    assert planned.step_time == pytest.approx(2 * (forward + backward))
    assert planned.bubble_fraction == pytest.approx(0.5)


def test_bfpp_trace_prints_a_row_per_rank_and_draws_both_on_one_axis(tmp_path, capsys):
    picture = tmp_path / "timeline.svg"
    assert main(["trace", written(tmp_path, document()), "--svg", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("step 20, 100.00 ms from first to last action; clocks agree within 31 us")
    assert lines[2].split() == ["0", "40.00", "ms", "49.00", "ms", "10.00", "ms", "60.0%", "50.0%"]
    assert lines[4].split() == ["all", "58.0%", "50.0%"]
    nodes = list(ElementTree.parse(picture).iter())
    boxes = [node for node in nodes if node.get("class") in ("F", "B")]
    assert len(boxes) == 8  # 4 planned, 4 measured
    backward = next(node for node in boxes[4:] if node[0].text.startswith("0B0"))
    scale = (900 - 76 - 14) / 100  # pixels per ms of the longer of the two
    assert float(backward.get("x")) == pytest.approx(76 + 60 * scale, abs=0.1)
    waits = [node for node in nodes if (node.get("class") or "").startswith("wait-") and len(node)]  # not the legend
    assert sorted(node.get("class") for node in waits) == ["wait-dp", "wait-dp", "wait-p2p", "wait-p2p"]
    words = [node.text for node in nodes if node.tag.endswith("}text")]
    assert "planned: step 86 ms, bubble 50.0%" in words
    assert "measured, step 20: step 100 ms, bubble 58.0%, 16.3% longer than planned" in words
    assert words.count("PP 2 x 1 chunks, 1 micro-batches") == 2 and UNKNOWN not in words


def test_unknown_waits_are_not_called_zero(tmp_path, capsys):
    picture = tmp_path / "timeline.svg"
    assert main(["trace", written(tmp_path, document(waits=False)), "--svg", str(picture)]) == 0
    assert capsys.readouterr().out.split().count("unknown") == 2
    assert picture.read_text().count(UNKNOWN) == 1, "the plan waits for nothing unknown, the measured step does"


def without_a_forward():
    """Return a trace whose order cannot have run: the backward of rank 0 stands there without its forward."""
    whole = document()
    return {**whole, "traceEvents": [each for each in whole["traceEvents"] if each.get("name") != "0F0"]}


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is no JSON, or was cut off"),
        ('{"traceEvents": []}', "is no trace of megatron_bfpp"),
        ("[1, 2]", "is no trace of megatron_bfpp"),
        ({**document(), "traceEvents": document()["traceEvents"][:14]}, "the trace is damaged"),
        (without_a_forward(), "the trace is damaged: no rank can run its next action"),
        ({**document(), "otherData": {**document()["otherData"], "steps": []}}, "holds no step"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(content, words, tmp_path, capsys):
    assert main(["trace", written(tmp_path, content)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and len(error.splitlines()) <= 3


def test_a_step_that_is_not_there(tmp_path, capsys):
    assert main(["trace", written(tmp_path, document()), "--step", "3"]) == 2
    assert "has no step 3.\n  Use --step 20.\n" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "nothing.json")]) == 2


def test_a_median_of_no_backward_is_none():
    measured = steps_of(document())[20]
    assert measured.action_time(Op.F) == pytest.approx(14) and measured.action_time(Op.SEND_F) is None
