"""The flags of traces and runs, the files that are left whatever happens, and the charts."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration import process
from megatron_bfpp.integration.flags.settings import run_dir_of, trace_steps_of, word_of_job
from megatron_bfpp.integration.observe import apply as observe
from megatron_bfpp.integration.observe import metrics, run_files, step_log


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "names no steps"), ("3-", "names no steps"), ("20:22", "names no steps"), ("-1", "names no steps"),
        ("1-2-3", "names no steps"), ("two", "names no steps"), ("²", "names no steps"), ("0-2", "count from 1"),
        ("5-4", "first the smaller"), ("1-51", "51 steps"), ("9" * 30, "names no steps"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_traced_are_refused_in_one_sentence(text, words):
    with pytest.raises(UserError, match=words) as error:
        trace_steps_of(SimpleNamespace(bfpp_trace_steps=text))
    assert len(str(error.value).splitlines()) == 2


def test_steps_that_can_be_traced():
    found = [trace_steps_of(SimpleNamespace(bfpp_trace_steps=text)) for text in ("20-22", "7", "1-50", None)]
    assert found == [(20, 22), (7, 7), (1, 50), None]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"pipeline_model_parallel_size": 1}, "needs pipeline ranks"),
        ({"train_iters": 19}, "begins with step 20, but --train-iters is 19"),
        ({"overlap_moe_expert_parallel_comm": True}, "a forward and a backward run as one there"),
        ({"cuda_graph_impl": "full_iteration"}, "nothing of it runs on the host"),
        ({"cuda_graph_scope": ["full_iteration"]}, "nothing of it runs on the host"),
    ],
)
def test_a_job_that_cannot_be_traced_is_refused_before_anything_is_wrapped(more, words, monkeypatch):
    monkeypatch.setattr(observe.seams, "apply", None)  # would raise
    monkeypatch.delenv("BFPP_RUN_DIR", raising=False)
    given = {"pipeline_model_parallel_size": 4, "bfpp_trace_steps": "20-22", "train_iters": 100}
    args = SimpleNamespace(**given | more)
    with pytest.raises(UserError, match=words) as error:
        observe.observe(args)
    assert len(str(error.value).splitlines()) == 2


def test_a_job_that_asks_for_nothing_is_left_alone(monkeypatch):
    monkeypatch.setattr(observe.seams, "apply", None)
    for name in ("BFPP_RUN_DIR", "BFPP_STEP_LOG"):
        monkeypatch.delenv(name, raising=False)
    args = SimpleNamespace(pipeline_model_parallel_size=4, tensorboard_dir=None, wandb_project="")
    assert observe.observe(args) == []


def test_the_flag_of_the_folder_wins_over_the_variable(monkeypatch):
    monkeypatch.setenv("BFPP_RUN_DIR", "of the variable")
    assert run_dir_of(SimpleNamespace(bfpp_run_dir="of the flag")) == "of the flag"
    assert run_dir_of(SimpleNamespace(bfpp_run_dir=None)) == "of the variable"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of one process."""

    def all_gather_object(found, mine):
        found[0] = mine

    one = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1, all_gather_object=all_gather_object)
    monkeypatch.setattr(run_files, "dist", one)
    monkeypatch.setattr(run_files, "describe", lambda args, name, hosts: {"name": name, "hosts": hosts})
    return run_files.Run(str(tmp_path / "a" / "run"))


def train_with(run, ends):
    def train():
        run.add(1, {"step": 1})
        run.add(2, {"step": 2})
        ends()

    return run.around(True, True, train)


def end_of(run):
    found = json.loads((run.folder / "end.json").read_text())
    assert found.pop("ended").endswith("+00:00") and found.pop("steps") == 2
    return found["status"], found["reason"]


def test_a_run_that_finishes(run):
    train_with(run, lambda: None)
    assert end_of(run) == ("finished", None)
    assert json.loads((run.folder / "run.json").read_text())["name"] == "run"
    train_with(run, lambda: None)  # resumed: its lines follow
    assert [json.loads(line)["step"] for line in (run.folder / "steps.jsonl").read_text().splitlines()] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("out of memory"), ("failed", "rank 0: RuntimeError: out of memory")),
        (KeyboardInterrupt(), ("failed", "rank 0: KeyboardInterrupt: ")),
        (SystemExit(3), ("failed", "rank 0: exit code 3")),
        (SystemExit(0), ("finished", None)),  # --exit-interval
        (SystemExit(), ("finished", None)),
    ],
)
def test_a_run_that_ends_early_says_why_and_the_error_goes_on(run, error, expected):
    def ends():
        raise error

    with pytest.raises(type(error)):
        train_with(run, ends)
    assert end_of(run) == expected


@pytest.mark.parametrize("begins", [True, False])  # while it builds the model, or the data
def test_a_job_that_dies_before_it_trains_says_what_it_was_and_why(begins, run):
    def dies():
        raise MemoryError("no room for the model")

    run.around(True, False, lambda: None)
    assert not (run.folder / "end.json").exists()  # a model that is built is no end
    with pytest.raises(MemoryError):
        run.around(begins, False, dies)
    assert json.loads((run.folder / "run.json").read_text())["name"] == "run"
    end = json.loads((run.folder / "end.json").read_text())
    assert (end["status"], end["reason"], end["steps"]) == ("failed", "rank 0: MemoryError: no room for the model", 0)


@pytest.mark.parametrize("told, expected", [("2", 2), ("", None), ("two", None), (None, None)])
def test_the_round_of_an_ab_is_kept(told, expected, monkeypatch):
    monkeypatch.delenv("BFPP_ROUND", raising=False)
    if told is not None:
        monkeypatch.setenv("BFPP_ROUND", told)
    assert run_files._round() == expected


def test_the_first_rank_that_fails_is_the_one_that_is_told(run):
    run.steps = 2
    run.end("RuntimeError: mine")
    run.end("RuntimeError: because of it")
    assert end_of(run) == ("failed", "rank 0: RuntimeError: mine")


def test_a_full_disk_is_told_and_training_goes_on(run, capsys):
    (run.folder / "steps.jsonl").symlink_to("/dev/full")
    run.add(4, {"step": 4})
    assert "WARNING: step 4 is missing in" in capsys.readouterr().out
    run.folder = run.folder / "gone"
    run.end()
    assert "WARNING: --bfpp-run-dir" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_is_told_and_training_goes_on(tmp_path, capsys):
    process.write_or_warn(str(tmp_path / "gone" / "trace.json"), "{}", "--bfpp-trace-steps")
    assert "WARNING: --bfpp-trace-steps" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        run_files.Run(str(tmp_path / "file" / "run"))


ARGUMENTS = {
    "pipeline_schedule": "1f1b", "virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 4,
    "microbatch_group_size_per_vp_stage": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "more, name",
    [
        ({}, "interleaved"), ({"virtual_pipeline_model_parallel_size": None}, "1f1b"),
        ({"microbatch_group_size_per_vp_stage": 8}, "interleaved-grouped"),
        ({"pipeline_schedule": "breadth-first"}, "breadth-first"),
        ({"pipeline_schedule": "breadth-first", "use_torch_fsdp2": True}, "breadth-first-sharded"),
        ({"pipeline_schedule": "breadth-first", "breadth_first_backward": "late"}, "breadth-first-late"),
        (
            {"pipeline_schedule": "breadth-first", "breadth_first_weight_gradients": "deferred"},
            "breadth-first-deferred",
        ),
        ({"pipeline_schedule": "breadth-first", "breadth_first_engine": "megatron"}, "breadth-first-megatron"),
    ],
)  # fmt: skip
def test_arms_have_the_names_of_bfpp_bench(more, name):
    from megatron_bfpp.schedule.names import SCHEDULES

    assert word_of_job(SimpleNamespace(**{**ARGUMENTS, **more}), 8) == name and name in SCHEDULES


def test_charts_stand_beside_megatrons_own_in_both_writers(monkeypatch):
    from megatron.training import global_vars

    told = []
    board = SimpleNamespace(add_scalar=lambda *scalar: told.append(("tensorboard", *scalar)))
    wandb = SimpleNamespace(log=lambda charts, step: told.append(("wandb", dict(charts), step)))
    monkeypatch.setattr(global_vars, "get_tensorboard_writer", lambda: board)
    monkeypatch.setattr(global_vars, "get_wandb_writer", lambda: wandb)
    monkeypatch.setattr(metrics, "predicted_bubble", lambda args: 0.125)
    args = SimpleNamespace(log_interval=1, tensorboard_log_interval=5)
    found = {"tokens_per_s_per_gpu": None, "peak_memory_rank": 3, "exposed_p2p_s": [1.0], "exposed_dp_s": [0.5, 0.75]}
    step_log._chart(args, 5, metrics.charts(args, found), {})
    charts = {"bfpp/bubble_fraction_predicted": 0.125, "bfpp/exposed_dp_s": 0.75}
    assert told == [("tensorboard", name, value, 5) for name, value in charts.items()] + [("wandb", charts, 5)]
    told.clear()
    step_log._chart(args, 6, {"bfpp/tokens_per_s_per_gpu": 1.0}, {})
    assert told == []
    step_log._chart(args, 6, {"bfpp/bubble_fraction_measured": 0.5}, {})  # traced steps are few
    assert len(told) == 2


def test_nvtx_ranges_stay_when_a_step_is_recorded(monkeypatch):
    from megatron_bfpp.integration.step import forward_backward
    from megatron_bfpp.runtime.clocks import HostClock
    from megatron_bfpp.schedule import Action, Op
    from megatron_bfpp.timeline.recorder import Recorder

    told = []
    monkeypatch.setattr(forward_backward, "nvtx_range_push", lambda name: told.append(f"push {name}"))
    monkeypatch.setattr(forward_backward, "nvtx_range_pop", lambda name: told.append(f"pop {name}"))
    recorder = Recorder(HostClock())
    for is_on in (False, True):
        monkeypatch.setattr(forward_backward.core_utils, "_nvtx_enabled", is_on)
        for recording in (None, recorder):
            monkeypatch.setattr(process.RECORDING, "recorder", recording)
            span = forward_backward._span()
            assert (span is None) == (not is_on and recording is None)
            if span is not None:
                with span(Action(2, Op.F, 0)):
                    pass
    assert told == ["push PP:2F0", "pop PP:2F0"] * 2 and len(recorder.take()) == 2
