"""A split backward as it is shown and measured: the input's gradient (I) and the weights' (W), apart from F and B."""

import csv
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_bfpp.cli import main
from megatron_bfpp.integration.flags.settings import Settings
from megatron_bfpp.schedule import Action, Op, PipelineShape
from megatron_bfpp.schedule.costs import UNIT, Costs
from megatron_bfpp.schedule.formats import digest, read
from megatron_bfpp.schedule.ir import COMPUTE
from megatron_bfpp.schedule.names import order_of, predict
from megatron_bfpp.schedule.orders import weight_lags
from megatron_bfpp.timeline.document import Trace
from megatron_bfpp.timeline.intervals import ACTION, Interval
from megatron_bfpp.timeline.measured import steps_of
from megatron_bfpp.timeline.picture import shade

SIZES = ["--pp", "4", "--chunks", "2", "--microbatches", "4"]
DEFERRED = ["show", *SIZES, "--order", "breadth-first-deferred"]
BOTH = ["show", *SIZES, "--order", "interleaved", "--order", "breadth-first-deferred"]
PARTS = (Op.F, Op.B, Op.I, Op.W)


def rows(text):
    return [line.split("|")[1].split() for line in text.splitlines() if "|" in line]


def step_time(text):
    return float(text.split("step time ")[1].split()[0])


def test_the_grid_has_the_input_gradient_and_the_weights_gradient_apart(capsys):
    assert main(["show", "--pp", "2", "--chunks", "1", "--microbatches", "3", "--order", "breadth-first-deferred"]) == 0
    out = capsys.readouterr().out
    assert rows(out) == [
        ["f00", "f01", "f02", "i00", "w00", "i01", "w01", "i02", "w02", "."],
        [".", "f00", "i00", "f01", "i01", "f02", "i02", "w00", "w01", "w02"],
    ]
    assert out.splitlines()[-1].endswith("peak owed weights' gradients 3 (pp_rank 1) to 1")


@pytest.mark.parametrize("more, lag", [([], None), (["--breadth-first-hop", "1"], None), (["--weight-lag", "2"], 2)])
@pytest.mark.parametrize("backward", ["eager", "late"])
def test_the_plan_is_the_one_that_a_job_runs(more, lag, backward, tmp_path, capsys):
    words = ["--pp", "4", "--chunks", "2", "--microbatches", "8", "--order", "breadth-first-deferred"]
    assert main(["show", *words, *more, "--backward", backward, "--plan", "--csv", str(tmp_path / "plan.csv")]) == 0
    settings = Settings(
        "breadth-first", backward, weight_gradients="deferred", weight_lag=lag, hop=1.0 if "1" in more else 0.25
    )
    plan = settings.plan_of(PipelineShape(4, 2, 8))
    assert digest(read(str(tmp_path / "plan.csv"))) == plan.digest


@pytest.mark.parametrize("lag, step", [("3", 27), ("1", 29), ("0", 30)])
def test_the_dial_is_the_most_that_a_rank_owes(lag, step, capsys):
    assert main([*DEFERRED, "--weight-lag", lag]) == 0
    out = capsys.readouterr().out
    assert step_time(out) == step and f"weights' gradients {int(lag) + 1} (" in out


def test_the_times_of_the_parts_add_up_to_a_backward(capsys):
    assert main([*DEFERRED, "--text"]) == 0
    assert main([*DEFERRED, "--backward-time", "3", "--weights-time", "1"]) == 0
    line = rows(capsys.readouterr().out)[0]
    assert (line.count("i00"), line.count("w00")) == (2, 1)


def test_a_late_backward_can_be_split_too(capsys):
    assert main([*BOTH, "--backward", "late"]) == 0
    assert "breadth-first-late-deferred:" in capsys.readouterr().out
    assert main([*DEFERRED, "--backward", "late", "--text"]) == 0
    assert capsys.readouterr().out.splitlines()[3] == (
        "3F0 3F1 3F2 3F3 7F0 7F1 7F2 7F3 7I0 7I1 7I2 7I3 7W0 3I0 7W1 3I1 7W2 3I2 7W3 3I3 3W0 3W1 3W2 3W3"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([*DEFERRED, "--weight-lag", "-1"], "--weight-lag: '-1' is not a whole number of at least 0"),
        (["show", *SIZES, "--weight-lag", "1"], "--weight-lag is of a split backward.\n  Leave it out, or add --order"),
        (["show", "/nowhere/order.csv", "--weight-lag", "1"], "--weight-lag is of an --order, and a file has its own"),
        (["show", *SIZES, "--resident-chunks", "9"], "--resident-chunks is 9, but a rank has"),
        (["show", *SIZES, "--weights-time", "1"], "--weights-time is a part of a split backward, and no order"),
        ([*DEFERRED, "--weights-time", "0"], "--weights-time: '0' is not a number from 0.01 to 100"),
        ([*DEFERRED, "--weights-time", "2"], "--weights-time 2 leaves less than 0.01 of --backward-time 2 for the"),
    ],
)
def test_a_flag_that_fits_neither_order_nor_shape_is_refused(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and words in said and len(said.splitlines()) == 2 and "Traceback" not in said


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "both.svg"
    assert main([*BOTH, "--svg", str(path)]) == 0
    return list(ElementTree.parse(path).iter())


def test_the_picture_has_a_box_for_each_part_and_names_what_it_draws(picture, tmp_path):
    of_each = {op: [node for node in picture if node.get("class") == op.value] for op in PARTS}
    assert {op: len(nodes) for op, nodes in of_each.items()} == {Op.F: 64, Op.B: 32, Op.I: 32, Op.W: 32}
    assert of_each[Op.W][0][0].text.startswith("4W0 (chunk 1): ")
    words = [node.text for node in picture if node.tag.endswith("}text")]
    names = ("forward", "backward", "input's gradient", "weights' gradient")
    assert all(f"{name}, first chunk to last" in words for name in names)
    assert "Planned, not measured. In forwards of a chunk: backward 2, of it weights' gradient 1." in words
    plain = tmp_path / "plain.svg"
    assert main(["show", *SIZES, "--svg", str(plain)]) == 0
    assert "gradient" not in plain.read_text()


def channels(color):
    return [int(color[at : at + 2], 16) for at in (1, 3, 5)]


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_the_parts_have_colours_of_their_own_and_the_weights_the_calm_one(chunks):
    for chunk in range(chunks):
        colors = {op: channels(shade(op, chunk, chunks)[0]) for op in PARTS}
        for op in (Op.I, Op.W):
            for other in set(PARTS) - {op}:
                assert sum(abs(a - b) for a, b in zip(colors[op], colors[other])) >= 40, (op, other, chunk)
        strength = {op: max(color) - min(color) for op, color in colors.items()}
        assert strength[Op.W] <= 0.6 * strength[Op.I] and sum(colors[Op.W]) > sum(colors[Op.I]), chunk


def test_the_page_has_a_column_for_what_is_owed(tmp_path):
    page = tmp_path / "page.html"
    assert main([*BOTH, "--html", str(page)]) == 0
    text = page.read_text()
    assert "<th>peak owed weights' gradients by rank</th>" in text and "<td>1, 2, 3, 4</td>" in text
    assert main(["show", *SIZES, "--html", str(page)]) == 0
    assert "owed" not in page.read_text()


def test_the_planned_trace_has_both_parts_by_their_own_names(tmp_path):
    path = tmp_path / "plan.json"
    assert main([*DEFERRED, "--trace", str(path)]) == 0
    compute = [each for each in json.loads(path.read_text())["traceEvents"] if each.get("cat") == "compute"]
    ops = [Action.parse(each["name"]).op for each in compute]
    assert {op: ops.count(op) for op in COMPUTE} == {Op.F: 32, Op.B: 0, Op.I: 32, Op.W: 32}


@pytest.mark.parametrize("is_plan", [False, True])
def test_the_csv_of_a_split_order_is_shown_and_proved_again(is_plan, tmp_path, capsys):
    first, again = tmp_path / "first.csv", tmp_path / "again.csv"
    plan = ["--plan"] if is_plan else []
    assert main([*DEFERRED, "--csv", str(first), *plan]) == 0
    assert main(["show", str(first), "--csv", str(again), *plan, "--weights-time", "1"]) == 0
    assert again.read_text() == first.read_text()
    if is_plan:
        assert main(["check", str(first)]) == 0
        assert "sound: PP 4 x 2 chunks, 4 micro-batches" in capsys.readouterr().out


@pytest.mark.parametrize("is_merged", [False, True])
def test_torchs_interleaved_zero_bubble_is_shown_from_its_csv(is_merged, tmp_path, capsys):
    """torch can merge an I and the W right behind it into a B, which leaves I, W and B in one file."""
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules", reason="needs torch")
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    order = get_schedule_ops("InterleavedZeroBubble", 4, 8, 2)
    order = [schedules._merge_bw(actions) for actions in order] if is_merged else order
    path = tmp_path / "zero_bubble.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(order)
    assert main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert step_time(out) == 51  # (P-1) f more than 8 micro-batches of 2 chunks take
    assert ("b10" in out) == is_merged and "i10" in out and "w10" in out
    assert main(["show", str(path), "--plan", "--csv", str(tmp_path / "plan.csv")]) == 0
    assert main(["check", str(tmp_path / "plan.csv")]) == 0


def test_a_measured_step_has_a_time_for_each_part_and_its_plan_too(tmp_path, capsys):
    times = {"0F0": (0, 10), "1F0": (10, 20), "1I0": (20, 28), "1W0": (28, 34), "0I0": (30, 38), "0W0": (38, 46)}
    ranks = [
        [Interval(Action.parse(name), ACTION, 1e6 * start, 1e6 * end) for name, (start, end) in times.items()
         if name.startswith(str(rank))]
        for rank in range(2)
    ]  # fmt: skip
    trace = Trace(2, {"schedule": "breadth-first-deferred", "waits": True})
    trace.add(20, PipelineShape(2, 1, 1), ranks, clock_error_us=[0.0, 1.0])
    measured = steps_of(trace.document())[20]
    assert {op: measured.action_time(op) for op in PARTS} == {Op.F: 10, Op.B: None, Op.I: 8, Op.W: 7}
    planned = measured.planned()
    assert planned.step_time == pytest.approx(10 + 10 + 8 + 8 + 7)
    assert planned.peak_owed_weight_gradients() == [1, 1]
    path, drawn = tmp_path / "trace.json", tmp_path / "trace.svg"
    path.write_text(json.dumps(trace.document()))
    assert main(["trace", str(path), "--svg", str(drawn)]) == 0
    said = capsys.readouterr().out
    assert "median: forward 10.00 ms, input's gradient 8.00 ms, weights' gradient 7.00 ms" in said
    classes = [node.get("class") for node in ElementTree.parse(drawn).iter()]
    assert [classes.count(op.value) for op in PARTS] == [4, 0, 4, 4]


PAGE = (Path(__file__).parents[2] / "docs/guide/split_backward.md").read_text(encoding="utf-8")
WORDS = ("interleaved", "breadth-first", "breadth-first-deferred")
ROWS = re.findall(r"^\| (\d+) x (\d+), (\d+) \| (\S+) \| (\S+) \((\S+)\) \| (.*) \|$", PAGE, re.MULTILINE)


def step_of(word, shape, costs=UNIT):
    return predict(word, order_of(word, shape), shape, costs)[1].step_time


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_the_steps_of_the_guide_are_those_that_show_prints(row, capsys):
    shape = PipelineShape(*map(int, row[:3]))
    assert float(row[4]) == float(row[5]) * 2 * shape.num_microbatches  # beta: in the backwards of a chunk
    least = 3 * shape.num_chunks * shape.num_microbatches
    words = [word for name in WORDS for word in ("--order", name)]
    sizes = ["--pp", row[0], "--chunks", row[1], "--microbatches", row[2]]
    assert main(["show", *sizes, *words, "--hop", row[3], "--reduction", row[4]]) == 0
    steps = [
        float(step) for step in re.findall(r"^step time (\S+) forward units", capsys.readouterr().out, re.MULTILINE)
    ]
    found = " | ".join(f"{step:.6g} ({step / least - 1:.1%})" for step in steps)
    assert found == row[6].replace("*", ""), found


def test_the_guide_has_the_shapes_that_count():
    assert [row[:3] for row in ROWS[:2]] == [("4", "4", "4"), ("8", "4", "8")] and len(ROWS) == 8


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 4, 4), (8, 4, 8), (8, 2, 20), (5, 3, 7)])
def test_the_formulas_of_the_guide_are_the_idle_times_that_show_predicts(sizes):
    shape = PipelineShape(*sizes)
    least, behind = 3 * shape.num_chunks * shape.num_microbatches, shape.pp_size - 1
    assert step_of("breadth-first", shape) - least == 3 * behind
    assert step_of("breadth-first-deferred", shape) - least == behind
    for most in range(shape.pp_size + 1):
        order = order_of("breadth-first-deferred", shape, weight_lag=weight_lags(shape, most))
        step = predict("breadth-first-deferred", order, shape)[1].step_time
        assert step - least == max(behind, 2 * behind - most), most


@pytest.mark.parametrize("sizes, pays", [((8, 4, 8), 0.2), ((8, 4, 32), 0.05)])
def test_a_split_pays_while_its_cost_is_below_what_the_guide_says(sizes, pays):
    shape = PipelineShape(*sizes)
    assert f"{pays:.0%} at" in PAGE or f"{pays:.0%}\n  at" in PAGE
    whole = step_of("breadth-first", shape)
    for more, is_shorter in ((pays - 0.01, True), (pays + 0.01, False)):
        assert (step_of("breadth-first-deferred", shape, Costs(backward=2 * (1 + more))) < whole) == is_shorter
