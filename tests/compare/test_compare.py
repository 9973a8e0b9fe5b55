"""bfpp compare: its numbers from files, what it refuses, and that no damage of the files stops it."""

import json
import sys
from pathlib import Path

import pytest
from ab_runs import OUT_OF_MEMORY, compared, make_run, two_arms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bfpp.cli import main
from megatron_bfpp.compare.confidence import ratio_interval
from megatron_bfpp.compare.numbers import compare
from megatron_bfpp.compare.page import page
from megatron_bfpp.compare.runs import load, read
from megatron_bfpp.compare.text import markdown, terminal
from megatron_bfpp.console.errors import UserError


def test_the_numbers_of_an_arm_are_those_of_its_steps_after_the_warm_up(tmp_path):
    comparison = compared(make_run(tmp_path, "1f1b", step_s=0.4), make_run(tmp_path, "breadth-first", step_s=0.32))
    first, second = comparison.arms
    assert comparison.warmup == 5 and comparison.is_good
    assert (first.step_s_p50, first.step_s_p90, second.step_s_p50) == (0.4, 0.4, 0.32)
    assert second.ratio == pytest.approx(0.8) and first.ratio is None
    assert first.tokens_per_s_per_gpu == pytest.approx(1600 / 0.4 / 4)
    assert first.tflops_per_gpu == pytest.approx(3.2 / 0.4 / 4)
    assert (first.peak_memory_gib, first.peak_memory_rank) == (3.2, 0)
    assert (second.bubble_measured, second.bubble_predicted, second.exposed_dp_s) == (0.17, 0.158, 0.002)
    assert second.interval.low is None and second.interval.kind == "none: 1 run"


def test_traced_steps_are_not_timed(tmp_path):
    run = read(make_run(tmp_path, "1f1b", steps=12))
    assert run.traced == {10} and len(run.timed(0)) == 9  # without the first step, which has no time, and 10 and 11


def test_p50_and_p90_are_medians_over_runs(tmp_path):
    paths = [make_run(tmp_path, "1f1b", each, step_s=step_s) for each, step_s in enumerate((0.3, 0.5, 0.4), 1)]
    (arm,) = compared(*paths).arms
    assert arm.step_s_p50 == 0.4 and [each.round for each in arm.times] == [1, 2, 3]


@pytest.mark.parametrize("steps, warmup, dropped, told", [(8, None, 4, True), (12, None, 5, False), (12, 7, 7, False)])
def test_the_warm_up_of_short_runs_is_shorter_and_told(tmp_path, steps, warmup, dropped, told):
    comparison = compared(*two_arms(tmp_path, steps=steps), warmup=warmup)
    assert comparison.warmup == dropped
    assert any("dropped as warm-up instead of 5" in note for note in comparison.notes) is told


def test_few_timed_steps_are_told(tmp_path):
    comparison = compared(*two_arms(tmp_path, steps=15))
    assert "breadth-first: 8 timed steps in a run are too few to say much" in comparison.notes


def test_a_warm_up_longer_than_the_runs_leaves_no_time_and_says_so(tmp_path):
    comparison = compared(*two_arms(tmp_path), warmup=50)
    assert comparison.arms[0].step_s_p50 is None and comparison.arms[1].ratio is None
    assert "1f1b has no timed step after the warm-up" in comparison.notes


def test_the_interval_pairs_rounds_and_holds_the_ratio(tmp_path):
    pytest.importorskip("scipy")
    comparison = compared(*two_arms(tmp_path, rounds=3))
    found = comparison.arms[1].interval
    assert found.kind == "paired over 3 rounds" and found.low < comparison.arms[1].ratio < found.high
    # A drift from round to round that both arms share does not widen a paired interval; it does widen Welch's.
    drift = {1: 1.0, 2: 1.5, 3: 2.0}
    faster = {each: value * ratio for (each, value), ratio in zip(drift.items(), (0.9, 0.91, 0.89), strict=True)}
    paired = ratio_interval(faster, drift)
    welch = ratio_interval({f"run {each}": value for each, value in faster.items()}, drift)
    assert welch.kind == "Welch over 3 and 3 runs"
    assert 0.85 < paired.low < 0.9 < paired.high < 0.95 and welch.high - welch.low > 10 * (paired.high - paired.low)
    assert paired.low == pytest.approx(0.87546, abs=1e-4) and paired.high == pytest.approx(
        0.92515, abs=1e-4
    )  # t = 4.3027
    same = ratio_interval({1: 1.0, 2: 1.0}, {1: 2.0, 2: 2.0})
    assert same.low is None and same.kind == "none: no spread"


def test_without_scipy_there_is_no_interval_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    comparison = compared(*two_arms(tmp_path, rounds=3))
    assert comparison.arms[1].interval.kind == "none: no scipy" and "none: no scipy" in terminal(comparison)


def test_losses_that_differ_are_told_with_the_first_step_and_the_size(tmp_path, capsys):
    paths = two_arms(tmp_path, loss_error=1e-6)
    assert main(["compare", *map(str, paths)]) == 1
    told = capsys.readouterr().out
    assert "breadth-first.1: losses DIFFER: from step 11 on, largest relative difference 1e-06 (lm loss, step" in told
    assert main(["compare", *map(str, paths), "--loss-tolerance", "1e-5"]) == 0
    assert "within the tolerance 1e-05" in capsys.readouterr().out


def test_equal_losses_with_other_gradient_norms_are_equal_losses(tmp_path):
    one, two = two_arms(tmp_path)
    lines = [
        json.loads(line) | {"grad norm hex": (0.1).hex(), "grad norm": 0.1}
        for line in (two / "steps.jsonl").read_text().splitlines()
    ]
    (two / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison = compared(one, two)
    assert comparison.is_good
    assert (
        "bit-identical over 20 common steps in 1 of 1 compared runs; gradient norms differ: from step 1 on"
        in terminal(comparison)
    )


def test_a_loss_that_is_no_number_differs_from_one_that_is(tmp_path):
    one, two = two_arms(tmp_path)
    content = (two / "steps.jsonl").read_text().splitlines()
    last = json.loads(content[-1]) | {"lm loss": float("nan"), "lm loss hex": "nan"}
    (two / "steps.jsonl").write_text("\n".join([*content[:-1], json.dumps(last)]) + "\n")
    comparison = compared(one, two)
    assert not comparison.is_good and "largest relative difference not a number (lm loss, step 20)" in terminal(
        comparison
    )
    json.dumps(comparison.as_json(), allow_nan=False)


@pytest.mark.parametrize("end, kind", [(OUT_OF_MEMORY, "0 of 1: out of memory"), (None, "0 of 1: no end")])
def test_an_arm_that_did_not_finish_is_a_row_with_its_reason(tmp_path, capsys, end, kind):
    paths = two_arms(tmp_path, steps=3 if end else 20, end=end)
    assert main(["compare", *map(str, paths)]) == 1
    told = capsys.readouterr().out
    assert kind in told and (end["reason"] if end else "no end.json: killed after step 20, or still running") in told


def test_steps_that_a_restart_ran_again_count_once_and_warm_up_again(tmp_path):
    path = make_run(tmp_path, "1f1b", steps=12)
    lines = (path / "steps.jsonl").read_text().splitlines(keepends=True)
    again = [json.loads(line) for line in lines[8:]]
    again[0]["step_time_s"], again[1]["step_time_s"] = None, 9.0
    (path / "steps.jsonl").write_text("".join([*lines, *(json.dumps(line) + "\n" for line in again)]))
    run = read(path)
    assert [step.number for step in run.steps] == list(range(1, 13)) and run.timed(2)[-2:] == [0.4, 0.4]
    assert 9.0 not in run.timed(2) and run.notes == ["4 steps were run again after a restart: the later ones count"]


@pytest.mark.parametrize(
    "args, header, named",
    [
        ({"num_layers": 16}, {}, "num_layers (1f1b: 8, breadth-first: 16)"),
        ({"use_distributed_optimizer": True}, {}, "use_distributed_optimizer"),
        (
            {},
            {"environment": {"OMP_NUM_THREADS": "1", "NCCL_ALGO": "Ring"}},
            "NCCL_ALGO (1f1b: (not there), breadth-first: 'Ring')",
        ),
        ({}, {"versions": {"torch": "2.6.0", "transformer-engine": None}}, "version of torch"),
        ({}, {"device": "NVIDIA H100"}, "device"),
    ],
)
def test_arms_that_differ_in_more_than_the_schedule_are_refused(tmp_path, capsys, args, header, named):
    paths = two_arms(tmp_path, args=args, **header)
    assert main(["compare", *map(str, paths)]) == 2
    message = capsys.readouterr().err
    assert named in message and "--force" in message and len(message.strip().splitlines()) <= 3
    assert main(["compare", *map(str, paths), "--force"]) == 0
    assert f"--force: differs besides the schedule: {named}" in capsys.readouterr().out


def test_runs_of_one_arm_that_differ_are_refused(tmp_path):
    paths = [make_run(tmp_path, "1f1b", 1), make_run(tmp_path, "1f1b", 2, args={"num_layers": 16})]
    with pytest.raises(UserError, match=r"num_layers \(1f1b.1: 8, 1f1b.2: 16\)"):
        compared(*paths)


def test_arms_may_differ_in_the_schedule_and_in_what_full_sharding_demands(tmp_path):
    paths = [
        make_run(tmp_path, "1f1b", args={"use_distributed_optimizer": True}),
        make_run(
            tmp_path,
            "interleaved-grouped",
            args={
                "use_distributed_optimizer": True,
                "microbatch_group_size_per_vp_stage": 8,
                "overlap_p2p_comm_warmup_flush": True,
            },
        ),
        make_run(
            tmp_path,
            "breadth-first-sharded",
            args={"use_distributed_optimizer": False, "use_torch_fsdp2": True, "ckpt_format": "torch_dist"},
        ),
        make_run(
            tmp_path,
            "breadth-first-deferred",
            args={
                "use_distributed_optimizer": True,
                "breadth_first_weight_gradients": "deferred",
                "breadth_first_weight_lag": 1,
            },
        ),
    ]
    comparison = compared(*paths)
    assert set(comparison.changed["breadth-first-deferred"]) == {
        "pipeline_schedule",
        "breadth_first_weight_gradients",
        "breadth_first_weight_lag",
    }
    assert set(comparison.changed["breadth-first-sharded"]) == {
        "pipeline_schedule",
        "use_distributed_optimizer",
        "use_torch_fsdp2",
        "ckpt_format",
    }
    assert "save" not in comparison.changed["interleaved-grouped"]


def test_a_commit_in_megatron_cores_version_does_not_count(tmp_path):
    versions = [{"megatron-core": version} for version in ("0.19.2+608ae2a", "0.19.2+7089481", "0.18.2")]
    paths = [make_run(tmp_path, "1f1b", place, versions=each) for place, each in enumerate(versions, 1)]
    assert compared(*paths[:2]).arms[0].runs == 2
    with pytest.raises(UserError, match=r"version of megatron-core \(1f1b.1: '0.19.2', 1f1b.3: '0.18.2'\)"):
        compared(*paths)


def test_the_same_arm_twice_is_said_to_measure_scatter(tmp_path):
    comparison = compared(make_run(tmp_path, "1f1b"), make_run(tmp_path, "1f1b-again"))
    assert any("the two measure how much runs scatter" in note for note in comparison.notes)


def test_a_directory_of_runs_stands_for_them(tmp_path):
    two_arms(tmp_path, rounds=2)
    assert [(run.name, run.arm, run.round) for run in load([str(tmp_path)])] == [
        ("1f1b.1", "1f1b", 1),
        ("1f1b.2", "1f1b", 2),
        ("breadth-first.1", "breadth-first", 1),
        ("breadth-first.2", "breadth-first", 2),
    ]


# Damage


FILES = ("run.json", "steps.jsonl", "end.json")
BAD_VALUES = (
    None,
    1e999,
    -1,
    10**400,
    "\ud800",
    "<script>alert(1)</script>",
    "a|b\x1b[31m",
    [1, None],
    {"x": [{}]},
    True,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_of_the_files_stops_the_report(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    one, two = two_arms(folder, steps=12)
    for name in data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=3, unique=True)):
        damage(two / name, data)
    try:
        runs = load([str(one), str(two)])
    except UserError as error:
        assert "holds no run" in str(error)
        return
    comparison = compare(runs, force=True)
    html = page(comparison, runs)
    assert "<script" not in html
    for written in (
        html,
        terminal(comparison),
        markdown(comparison),
        json.dumps(comparison.as_json(), allow_nan=False),
    ):
        assert "\x1b" not in written.encode("utf-8").decode()


def damage(path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("missing", "cut", "bytes", "folder", "value", "text")))
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, 5000)) % len(content)])
    elif kind == "bytes":
        place = data.draw(st.integers(0, 5000)) % len(content)  # whose length depends on the folder
        path.write_bytes(content[:place] + data.draw(st.binary(max_size=8)) + content[place + 4 :])
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "text":
        path.write_text(
            data.draw(st.sampled_from(("[" * 100_000, "{}\n[]\n3\nnull", '{"step": 1}' * 2, "\ufeff{}", "1" * 5000)))
        )
    else:
        lines = content.decode().splitlines()
        place = data.draw(st.integers(0, len(lines) - 1))
        values = json.loads(lines[place])
        values[data.draw(st.sampled_from(sorted(values)))] = data.draw(st.sampled_from(BAD_VALUES))
        path.write_text("\n".join([*lines[:place], json.dumps(values), *lines[place + 1 :]]) + "\n")


def test_a_line_cut_off_by_a_kill_is_skipped_with_a_note(tmp_path):
    path = make_run(tmp_path, "1f1b", end=None)
    content = (path / "steps.jsonl").read_text()
    (path / "steps.jsonl").write_text(content[:-20])
    run = read(path)
    assert run.notes == ["the last line of steps.jsonl is cut off: skipped"] and len(run.steps) == 19
    (path / "steps.jsonl").write_text("no\n" + content)
    assert read(path).notes == ["1 lines of steps.jsonl are no steps, line 1 first: skipped"]


def test_a_run_without_run_json_is_still_a_row(tmp_path):
    one, two = two_arms(tmp_path)
    (two / "run.json").unlink()
    comparison = compared(one, two)
    assert comparison.arms[1].name == "breadth-first" and comparison.arms[1].step_s_p50 is not None
    assert "breadth-first: whether breadth-first.1 has the same configuration is not known" in comparison.notes
