"""bfpp plan: the table, the files it writes, and what it says to bad input."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_bfpp.cli import main
from megatron_bfpp.planner.strategy import DEFERRED

CONFIG = str(Path(__file__).parents[2] / "configs" / "gpt_52b.yaml")
ON_64 = ["plan", CONFIG, "--gpu", "v100-32", "--gpus", "64", "--tp", "8", "--pp", "8", "--micro-batch", "1,2"]
FLAGS = ["--num-layers", "64", "--hidden-size", "8192", "--num-attention-heads", "64", "--seq-length", "1024",
         "--vocab-size", "50257"]  # fmt: skip
ON_8 = ["plan", "--gpu", "h200", "--gpus", "8", "--", *FLAGS]
FP8 = [*ON_8, "--fp8-format", "hybrid"]


def exit_code(words):
    """Run bfpp, whose parser ends the process itself where a value cannot be."""
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


@pytest.mark.slow
def test_a_table_of_the_fastest_and_of_each_schedule_with_the_flags_to_paste(capsys):
    assert main([*ON_64, "--global-batch", "32"]) == 0
    shown = capsys.readouterr().out
    assert "GPT of 52.4B parameters, 64 x V100-32" in shown
    assert "rejected (--rejected says why)" in shown
    for schedule in ("1f1b", "interleaved", "interleaved-grouped", "breadth-first", DEFERRED):
        assert f"\n{schedule} " in shown
    assert "\nbreadth-first-late " not in shown, "it takes as long as the eager one, and more memory"
    assert "--pipeline-schedule breadth-first" in shown
    assert "--tensor-model-parallel-size 8" in shown


@pytest.mark.slow
def test_rejections_are_counted_by_reason(capsys):
    assert main([*ON_64, "--pp", "4", "--global-batch", "32", "--rejected"]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "strategies considered" in line]
    total = int(line.split(" fit, ")[1].split()[0])
    counts = [int(each.split()[0]) for each in shown.splitlines() if each[:8].strip().isdigit() and ": " in each]
    assert "memory: more than a GPU has" in shown
    assert 0 < sum(counts) <= total


@pytest.mark.slow
def test_several_batches_are_compared_and_drawn_and_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    words = [
        "--chunks",
        "1,8",
        "--global-batch",
        "16-64",
        "--json",
        str(data),
        "--plot",
        str(picture),
        "--critical-batch-size",
        "5000",
    ]
    assert main([*ON_64, *words]) == 0
    assert "TFLOP/s per GPU" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(data.read_text())
    assert [each["global_batch"] for each in content["batches"]] == [16, 32, 64]
    for each in content["batches"]:
        assert each["considered"] == each["fit"] + sum(each["rejected"].values())
        best = each["fastest"][0]
        assert best["step_s"] == pytest.approx(min(one["step_s"] for one in each["schedules"]))
        parts = ("parameters", "gradients", "optimizer", "activations", "messages")
        assert sum(best["memory"][part] for part in parts) <= best["memory"]["total"] < 28e9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.png"]


def test_the_strategy_of_a_file_and_a_measured_step(capsys):
    config = CONFIG.replace("gpt_52b", "gpt_52b_64_v100")
    words = ["plan", config, "--gpu", "v100-32", "--gpus", "64", "--as-configured"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("breadth-first ")]
    step_s = float(line.split()[10])
    assert main([*words, "--calibrate", str(1.25 * step_s)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("calibrated: large matrix products achieve ")
    (line,) = [line for line in shown.splitlines() if line.startswith("breadth-first ")]
    assert float(line.split()[10]) == pytest.approx(1.25 * step_s, abs=2e-3)


def test_a_model_of_flags(capsys):
    on_64 = ["--gpu", "h100-80", "--gpus", "64", "--global-batch", "64", "--tp", "8", "--pp", "8"]
    assert main(["plan", *on_64, "--chunks", "1", "--micro-batch", "1", "--", *FLAGS]) == 0
    assert "GPT of 52.0B parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_52b_on_4096_gpus_is_searched_in_time():
    started = time.monotonic()
    command = [sys.executable, "-m", "megatron_bfpp.cli", "plan", CONFIG, "--gpu", "v100-32", "--gpus", "4096"]
    done = subprocess.run([*command, "--global-batch", "2048"], check=True, capture_output=True, text=True, timeout=300)
    # Neither a bar in a file, nor torch: 2 to 4 s on two idle cores.
    assert done.stderr == "" and time.monotonic() - started < 30
    assert "breadth-first" in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["plan", CONFIG, "--gpu", "b300", "--gpus", "64"], "--gpu b300 does not exist"),
        (["plan", CONFIG, "--gpu", "h200"],
         "--gpus is not given.\n  Add --gpu KIND and --gpus N, or `cluster: {gpu: KIND"),
        (["plan", CONFIG], "--gpu and --gpus are not given"),
        (["plan", "--", *FLAGS], "--gpu and --gpus are not given"),
        (["plan", CONFIG, CONFIG, "--gpu", "h200", "--gpus", "64"], "is more than one file"),
        ([*ON_64, "--top", "0"], "argument --top: '0' is not a whole number of at least 1"),
        ([*ON_64, "--critical-batch-size", "nan"], "argument --critical-batch-size: 'nan' is not a number"),
        ([*ON_64, "--global-batch", "16,32", "--as-configured"], "--as-configured is one strategy"),
        (["plan", "nowhere.yaml", "--gpu", "h200", "--gpus", "64"], "nowhere.yaml: cannot be read"),
        (["plan", CONFIG, "--gpu", "h200", "--gpus", "0"], "argument --gpus: '0' is not a whole number"),
        ([*ON_64, "--global-batch", "32x"], "argument --global-batch: '32x' is no list of numbers"),
        ([*ON_64, "--global-batch", "64-32"], "argument --global-batch: '64-32' is no range"),
        ([*ON_64, "--global-batch", "0"], "above 0"),
        ([*ON_64, "--pp", "4", "--global-batch", "31"], "none of 1 strategies for 64 GPUs is possible"),
        ([*ON_64, "--pp", "1", "--schedule", "breadth-first"], "Lift one: no-pipeline takes --pp 1"),
        ([*ON_64, "--as-configured", "--global-batch", "33"], "33 is no multiple of "),
        ([*ON_64, "--schedule", "gpipe"], "argument --schedule: 'gpipe' does not exist"),
        ([*ON_64, "--sharding", "zero9"], "argument --sharding: 'zero9' does not exist"),
        ([*ON_64, "--precision", "bf16"], "has no bf16"),
        ([*ON_64, "--reserve-gb", "40"], "leaves nothing"),
        ([*ON_64, "--plot", "x.png"], "Give several batches"),
        ([*ON_64, "--calibrate", "1"], "a step of 1 s cannot be explained"),
        (["plan", CONFIG, "--gpu", "v100-32", "--gpus", "8", "--global-batch", "8"],
         "the model fits nowhere: 8 GPUs with 28.0 GB"),
        (["plan", CONFIG, "--gpu", "v100-32", "--gpus", "64", "--as-configured"],
         "the flags' strategy does not fit:"),
        (["plan", "--gpu", "h200", "--gpus", "8", "--global-batch", "8", "--", "--num-layers", "4"],
         "the model lacks --hidden-size"),
        (ON_8, "no global batch is given"),
        ([*ON_8, "--micro-batch-size", "-1"], "the model's flags: argument --micro-batch-size: '-1' is not a whole"),
        ([*ON_8, "--pipeline-model-parallel-size", "-2"], "argument --pipeline-model-parallel-size: '-2' is not"),
        ([*ON_8, "--kv-channels", "0"], "argument --kv-channels: '0' is not a whole number of at least 1"),
        ([*ON_8, "--flextron"], "--flextron trains several sizes of one model"),
        ([*ON_8, "--yaml-cfg", "x.yaml"], "--yaml-cfg has the model in a file of another form"),
        ([*ON_8, "--encoder-num-layers", "8"], "--encoder-num-layers trains an encoder beside the decoder (T5)"),
        (["plan", "--gpu", "a100-80", "--gpus", "8", "--global-batch", "8", "--", *FLAGS, "--fp8-format", "hybrid"],
         "has no fp8"),
        ([*ON_8, "--fp8-param-gather"], "--fp8-param-gather is for fp8"),
        ([*ON_8, "--fp8-format", "e5m2"], "invalid choice: 'e5m2'"),
        ([*FP8, "--fp8-recipe", "custom"], "--fp8-recipe custom"),
        ([*FP8, "--use-torch-fsdp2"], "fp8 with --use-torch-fsdp2"),
        ([*FP8, "--fp8-param-gather"], "needs the distributed"),
        (["plan", "--gpu", "h200", "--gpus", "8", "--", *FLAGS[2:], "--num-layers", "many"], "the model's flags"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_exit_code_2_and_nothing_written(tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    assert exit_code([*words, *(["--json", "plan.json"] if "--" not in words else [])]) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") <= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "flags", "connections"),
    [
        ([], [], 1),  # Megatron demands it with tensor parallelism, but not with FSDP2, nor without TP
        (["--tp", "1"], [], 32),
        (["--sharding", "zero3"], [], 32),
        (["--connections", "32"], [], 32),
        (["--breadth-first-hop", "0.5"], ["--breadth-first-hop", "0.5"], 1),
        (["--breadth-first-hop", "0.25"], [], 1),
    ],
)
def test_the_hardware_queues_of_a_gpu_are_in_the_table_and_with_the_flags(tmp_path, capsys, more, flags, connections):
    words = ["plan", CONFIG, "--gpu", "h200", "--gpus", "64", "--global-batch", "32", "--micro-batch", "1"]
    only = ["--pp", "8", "--tp", "4", "--chunks", "2", "--schedule", "breadth-first", "--sharding", "zero1"]
    data = tmp_path / "plan.json"
    assert main([*words, *only, "--recompute", "none", *more, "--json", str(data)]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("breadth-first ")][:1]
    assert line.split()[-2:] == [str(connections), "-"]
    environment, pasted = shown.split("environment and flags of the fastest:\n")[1].splitlines()[:2]
    assert environment.strip() == f"CUDA_DEVICE_MAX_CONNECTIONS={connections}"
    hop = pasted.split()[pasted.split().index("--breadth-first-hop") :][:2] if "--breadth-first-hop" in pasted else []
    assert hop == flags
    assert json.loads(data.read_text())["batches"][0]["fastest"][0]["connections"] == connections


def test_an_unknown_key_of_a_model_file_is_named(tmp_path, capsys):
    path = tmp_path / "model.yaml"
    path.write_text("MODEL: {--num-layers: 4}\n")
    assert main(["plan", str(path), "--gpu", "h200", "--gpus", "8"]) == 2
    assert "unknown key 'MODEL'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys, flag):
    pytest.importorskip("matplotlib")
    words = ["plan", "--gpu", "h200", "--gpus", "2", "--global-batch", "8,16", flag, str(tmp_path / "no" / "plan.png")]
    assert main([*words, "--", "--num-layers", "4", *FLAGS[2:]]) == 2
    assert f"{flag} {tmp_path}" in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_the_search(monkeypatch, capsys):
    def searched(*_):
        raise AssertionError("the search has begun")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("megatron_bfpp.planner.command.search", searched)
    assert main([*ON_64, "--global-batch", "16-64", "--plot", "plan.png"]) == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


def test_the_cluster_of_a_file_is_planned_for_and_flags_win(capsys):
    config = CONFIG.replace("gpt_52b", "gpt_52b_64_a100_h100")
    for words, title in (
        ([], "64 x A100-80"), (["--gpu", "h100-80"], "64 x H100-80"), (["--gpus", "128"], "128 x A100-80"),
    ):  # fmt: skip
        assert main(["plan", config, "--as-configured", *words]) == 0
        assert title in capsys.readouterr().out


def test_a_profile_in_a_cluster_is_relative_to_its_file(tmp_path, capsys):
    profile = Path(__file__).parents[2] / "megatron_bfpp/planner/profiles/v100-32.yaml"
    (tmp_path / "mine.yaml").write_text(profile.read_text().replace("name: V100", "name: MINE"))
    (tmp_path / "model.yaml").write_text(
        f"base: {CONFIG.replace('gpt_52b', 'gpt_52b_64_v100')}\ncluster: {{gpu: mine.yaml}}\n"
    )
    assert main(["plan", str(tmp_path / "model.yaml"), "--as-configured"]) == 0
    assert "64 x MINE" in capsys.readouterr().out


def test_a_range_of_batches_doubles():
    from megatron_bfpp.planner.lists import doubling

    assert doubling("64-512") == (64, 128, 256, 512)
    assert doubling("48-400") == (48, 96, 192, 384)
    assert doubling("7-7") == (7,)
    assert doubling("8,4,8") == (8, 4)


@pytest.mark.slow
def test_the_search_shows_its_progress_to_the_end(monkeypatch):
    from megatron_bfpp.console import progress

    parts = []
    monkeypatch.setattr(progress, "show", lambda part, text: parts.append(part))
    assert main([*ON_64, "--chunks", "8", "--global-batch", "16,32"]) == 0
    assert parts == sorted(parts) and parts[0] == 0 and 0.85 < parts[-1] < 1
    assert max(after - before for before, after in pairwise(parts)) < 0.35
