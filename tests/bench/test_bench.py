"""bfpp bench: what it computes of measurements, and one short run of every arm in real processes."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bfpp.bench import command
from megatron_bfpp.bench.case import Case
from megatron_bfpp.bench.command import add_command
from megatron_bfpp.bench.results import Result, as_json, lower_bound_s, markdown, table
from megatron_bfpp.bench.settings import settings
from megatron_bfpp.cli import main
from megatron_bfpp.schedule import PipelineShape, breadth_first, lower
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.schedule.lower import add_send_recv
from megatron_bfpp.schedule.replay import replay

ROOT = Path(__file__).parents[2]
SHAPE, COSTS = PipelineShape(4, 2, 8), Costs(0.02, 0.04, hop=0.01)


def test_the_lower_bound_is_what_a_plan_that_hides_its_latency_takes():
    assert lower_bound_s(SHAPE, COSTS) == pytest.approx(0.06 * (16 + 3) + 0.01 * 6)
    assert lower_bound_s(SHAPE, COSTS) == pytest.approx(
        replay(lower(breadth_first(SHAPE), SHAPE), SHAPE, COSTS).step_time
    )


@pytest.mark.parametrize("sizes", [(2, 1, 1), (4, 2, 1), (4, 3, 3), (8, 2, 5), (3, 2, 9)])
@pytest.mark.parametrize("hop", [0.0, 0.5, 2.0])
def test_no_plan_is_faster_than_the_lower_bound(sizes, hop):
    shape, costs = PipelineShape(*sizes), Costs(hop=hop, transfer=hop / 4)
    for eager in (True, False):
        plan = lower(breadth_first(shape, eager_backward=eager), shape)
        assert replay(plan, shape, costs).step_time >= lower_bound_s(shape, costs) - 1e-9


def test_the_table_has_medians_and_ratios():
    results = [
        Result("interleaved", Case(SHAPE, COSTS, "hop 0.5"), [1.5, 1.4, 2.0]),
        Result("breadth-first", Case(SHAPE, COSTS, "hop 0.5"), [1.2, 1.3, 1.2]),
        Result("1f1b", Case(SHAPE, COSTS, "hop 0.5"), [1.8, 1.8, 1.8]),
    ]
    lines = table(results).splitlines()
    assert lines[0] == "PP 4 x 2 chunks, 8 micro-batches, network hop 0.5 (median of 3)"
    assert lines[3].split() == ["breadth-first", "1.200", "s", "8.3%", "1.000", "0.800", "+0.0%"]
    assert lines[4].split()[:5] == ["1f1b", "1.800", "s", "0.0%", "1.500"]
    first = as_json(results)["results"][0]
    assert first["step_times_s"] == [1.5, 1.4, 2.0] and first["lower_bound_s"] == pytest.approx(1.2)


def test_what_collectives_cost_is_in_the_table_and_in_the_bound():
    costs = Costs(0.02, 0.04, reduction=0.3, gather=0.1, buckets=2)
    result = Result("breadth-first", Case(SHAPE, costs, "free"), [1.4, 1.3, 1.6], [1.2, 1.2, 1.1])
    assert result.exposed_s == pytest.approx(0.2) and result.exposed == pytest.approx(0.5)
    assert lower_bound_s(SHAPE, costs) == pytest.approx(0.06 * 19 + 0.2)
    lines = table([result]).splitlines()
    assert lines[1].split()[-1] == "exposed" and lines[2].split()[-1] == "0.50" and lines[3].startswith("exposed: ")


def test_the_markdown_table_has_a_row_per_case():
    costs = Costs(0.02, 0.04, reduction=0.4)
    results = [
        Result("interleaved", Case(SHAPE, Costs(0.02, 0.04), "free"), [1.2]),
        Result("interleaved", Case(SHAPE, costs, "reduction 1"), [1.8], [1.2]),
        Result("breadth-first-sharded", Case(SHAPE, costs, "reduction 1"), [1.6], [1.2]),
    ]
    assert markdown(results).splitlines()[2:] == [
        "| 4 x 2, 8 | free | 1.053 |  |",
        "| 4 x 2, 8 | reduction 1 | 1.169 (1.50) | 1.039 (1.00) |",
    ]


def test_torchs_arms_are_predicted_from_torchs_plan():
    shape = PipelineShape(4, 1, 8)
    plan = add_send_recv(breadth_first(shape), shape)
    costs = Costs(1, 2, reduction=5, gather=1)
    alone, replicated = (
        Result("torch-looped-bfs", Case(shape, each, "free"), [1.0], plan=plan) for each in (Costs(1, 2), costs)
    )
    assert replicated.predicted_s == alone.predicted_s + 4 * 6  # each stage waits for its all-reduce


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shape", "4x2x8"], "--shape: '4x2x8' is not PP,CHUNKS,MICROBATCHES as in 4,2,8\n"),
        (["--shape", "1,2,8"], "pp_size is 1"),
        (["--forward-ms", "0"], "--forward-ms: '0' is not a number from 0.1 to 10000"),
        (["--repeat", "0"], "--repeat: '0' is not a whole number"),
        (["--jitter", "2"], "--jitter: '2' is not a number from 0 to 0.99"),
        (["--dp", "1"], "--dp: '1' is not a whole number from 2"),
        (["--reduction", "-1"], "--reduction: '-1' is not a number from 0"),
        (["--arm", "gpipe"], "--arm: invalid choice: 'gpipe' (choose from '1f1b', 'interleaved'"),
        (["--node-hop", "0.1"], "Add --node-size N."),
        (["--shape", "400,4,8"], "PP 400 is 400 processes; bfpp bench runs at most 128."),
        (["--shape", "100,2,100", "--reduction", "1"], "PP 100 x 2 replicas (--dp) is 200 processes"),
        (["--shape", "4,4,6"], "the arm interleaved: the last group has 2 microbatches"),
        (["--shape", "4,4,6", "--arm", "interleaved"], "Use a multiple of 4 micro-batches instead of 6"),
    ],
)
def test_bad_input_is_one_short_message(arguments, words, capsys):
    try:
        code = main(["bench", *arguments])
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert words in message and len(message.strip().splitlines()) <= 3


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(["bench", *words])


def test_a_model_runs_in_slow_motion_with_the_times_that_plan_estimates():
    configuration = str(ROOT / "configs" / "gpt_52b_512_h100.yaml")
    args = parsed("--model", configuration, "--gpu", "h100-80", "--gpus", "512")
    (setting,) = settings(args)
    assert setting.shape == PipelineShape(8, 8, 16) and setting.is_replicated
    assert args.connections == 1 and setting.case(args, ["1f1b"]).connections == 1  # it has tensor parallelism
    assert 1.5 < args.backward_time < 2.5 and 0 < setting.hop < 0.1 and 0 < setting.transfer < 0.5
    slower = parsed("--model", configuration, "--gpu", "a100-80", "--gpus", "512")
    assert settings(slower)[0].hop < setting.hop  # the network takes less of a slower GPU's time


def test_one_hardware_queue_is_in_the_name_of_the_network_and_in_the_prediction():
    words = ["--shape", "8,4,16", "--hop", "0.25"]
    found = []
    for more in ([], ["--connections", "1"], ["--connections", "1", "--breadth-first-hop", "0"]):
        args = parsed(*words, *more)
        (setting,) = settings(args)
        found.append(Result("breadth-first", setting.case(args, ["breadth-first"]), [1.0]))
    own, one, unplaced = (each.predicted_s for each in found)
    assert one == pytest.approx(own, rel=0.01) and unplaced > 1.05 * own
    assert [each.case.network for each in found] == ["hop 0.25", *["hop 0.25, one hardware queue"] * 2]
    assert as_json(found)["results"][2]["connections"] == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpu", "h100-80"], "but --gpus is not given"),
        (["--gpus", "64"], "but --gpu is not given"),
        (["--gpu", "h100-80", "--gpus", "64", "--hop", "0.5"], "but --hop is set as well"),
        (["--gpu", "h100", "--gpus", "64"], "h100"),
        (["--gpu", "h100-80", "--gpus", "63"], "63"),
        (["--gpu", "v100-32", "--gpus", "64"], "trains in bf16"),
    ],
)
def test_a_model_needs_its_gpus(arguments, words, capsys):
    assert main(["bench", "--model", str(ROOT / "configs" / "gpt_52b_64_a100_h100.yaml"), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and len(message.strip().splitlines()) <= 3


@pytest.mark.slow
def test_every_arm_runs_in_real_processes_and_none_beats_the_clock(tmp_path, capsys):
    pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
    pytest.importorskip("matplotlib")
    data, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ["--shape", "2,2,4", "--hop", "0.5", "--forward-ms", "4", "--repeat", "1", "--transfer", "0.25"]
    assert main(["bench", *options, "--json", str(data), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    results = json.loads(data.read_text())["results"]
    assert all(each["arm"] in printed for each in results)
    assert len(results) == 10 and len({each["arm"] for each in results}) == 10
    for each in results:
        assert each["free_step_times_s"] is None
        # Sleeps and messages take at least their time, whatever else the machine does; the bound is true for all arms.
        assert min(each["step_times_s"]) >= each["lower_bound_s"]
    assert picture.read_bytes().startswith(b"\x89PNG") and sorted(os.listdir(tmp_path)) == ["bench.json", "bench.png"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--shared-card", "--transfer", "0.5"]])
def test_every_arm_runs_with_data_parallel_collectives(tmp_path, capsys, more):
    pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
    data = tmp_path / "bench.json"
    options = [
        "--shape",
        "2,2,4",
        "--forward-ms",
        "4",
        "--repeat",
        "1",
        "--reduction",
        "1",
        "--gather",
        "0.5",
        "--buckets",
        "2",
    ]
    assert main(["bench", *options, *more, "--json", str(data)]) == 0
    assert "exposed" in capsys.readouterr().out
    results = json.loads(data.read_text())["results"]
    assert len({each["arm"] for each in results}) == 11  # full sharding too
    for each in results:
        assert min(each["step_times_s"]) >= each["lower_bound_s"]
        without = each["lower_bound_s"] - (each["reduction_s"] + each["gather_s"]) / 2
        assert min(each["free_step_times_s"]) >= without


@pytest.mark.slow
def test_nothing_but_progress_stands_on_standard_error():
    pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
    words = ["bench", "--shape", "2,2,2", "--forward-ms", "4", "--repeat", "1", "--arm", "interleaved", "--arm", "1f1b"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bfpp.cli", *words],
        check=False, capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    busy = "steps were run again: the machine was busy when the emulated work was due"
    assert lines[:2] == ["bench: 1 of 2 steps", "bench: 2 of 2 steps"]
    assert all(line.endswith(busy) for line in lines[2:]), done.stderr


def test_a_library_that_is_missing_is_named_before_the_first_step(monkeypatch, capsys):
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("measured before it was known"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", "bench.png"]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err
