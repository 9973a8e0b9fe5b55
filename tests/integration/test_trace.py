"""Traced steps on real processes: a valid and whole trace, the same bits, and the files of the run."""

import json
import math
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from gpt import UNTIED, ZERO_1, flags_of, losses, train
from jobs import run_job

from megatron_bfpp.schedule import PipelineShape, breadth_first, interleaved_1f1b, lower
from megatron_bfpp.schedule.costs import times_of
from megatron_bfpp.schedule.ir import COMPUTE
from megatron_bfpp.schedule.lower import DEFAULT_HOP
from megatron_bfpp.schedule.plan import lags_for
from megatron_bfpp.timeline.document import COMPUTE_LANE, LANES, RECEIVING, SENDING, WAITING
from megatron_bfpp.timeline.measured import steps_of

pytestmark = pytest.mark.slow

OURS = ("--pipeline-schedule", "breadth-first")


def traced(folder: Path, ranks: int, *flags: str, prepare=None) -> tuple[list[dict], Path]:
    """The bits of a run whose steps 2 and 3 are traced, and its folder."""
    run = folder / "runs" / "one"
    return train(folder, ranks, *flags, "--bfpp-trace-steps", "2-3", "--bfpp-run-dir", str(run), prepare=prepare), run


def events_of(run: Path) -> list[dict]:
    """All but those that name processes and lanes, which are checked here: each that has events has one name."""
    document = json.loads((run / "trace.json").read_text())
    assert document["displayTimeUnit"] in ("ms", "ns")
    named = [event for event in document["traceEvents"] if event["ph"] == "M"]
    events = [event for event in document["traceEvents"] if event["ph"] != "M"]
    lanes = {(event["pid"], event["tid"]): event["args"]["name"] for event in named if event["name"] == "thread_name"}
    processes = [event["pid"] for event in named if event["name"] == "process_name"]
    assert sorted(set(processes)) == sorted(processes) == list(range(len(processes)))
    assert lanes == {(process, lane): name for process in processes for lane, name in enumerate(LANES)}
    assert {(event["pid"], event["tid"]) for event in events} <= lanes.keys()
    return events


def assert_valid(events: list[dict], error_us: float) -> None:
    """Assert what Perfetto expects: sorted events, no overlap within a lane, every arrow from one slice to another."""
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events) and events[0]["ts"] == 0
    assert {event["ph"] for event in events} <= {"X", "s", "f"} and all(math.isfinite(event["ts"]) for event in events)
    slices: dict = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            lane = slices[event["pid"], event["tid"]]
            assert event["dur"] >= 0 and (not lane or event["ts"] >= lane[-1]["ts"] + lane[-1]["dur"] - 1e-3), event
            lane.append(event)
    starts, ends = ({event["id"]: event for event in events if event["ph"] == phase} for phase in "sf")
    assert starts.keys() == ends.keys() and len(starts) == sum(event["ph"] in "sf" for event in events) / 2
    for number, end in ends.items():
        start = starts[number]
        assert (start["tid"], end["tid"], end["bp"]) == (SENDING, RECEIVING, "e") and start["pid"] != end["pid"]
        assert (start["name"], start["cat"]) == (
            end["name"],
            end["cat"],
        )  # Perfetto binds the two by name, category and id
        assert start["ts"] <= end["ts"] <= start["ts"] + 60e6
        for event, tolerance in ((start, 1e-3), (end, error_us)):
            lane = slices[event["pid"], event["tid"]]
            assert any(e["ts"] - tolerance <= event["ts"] <= e["ts"] + e["dur"] + tolerance for e in lane), event


def names(events: list[dict], step: int, rank: int, *lanes: int) -> list[str]:
    return [
        event["name"] for event in events
        if event["ph"] == "X" and event["pid"] == rank and event["tid"] in lanes and event["args"]["step"] == step
    ]  # fmt: skip


class Wandb(ModuleType):
    """What Megatron calls of W&B: keeps what it is told, in a file."""

    def __init__(self, path: str):
        super().__init__("wandb")
        self.path, self.config = path, {}

    def init(self, **told):
        self._keep({"config": {name: str(value) for name, value in told["config"].items()}})

    def log(self, metrics, step=None, **_):
        ours = {name: value for name, value in metrics.items() if name.startswith("bfpp/")}
        self._keep({"step": step, "metrics": ours})

    def finish(self, *_, **__):
        self._keep({"finished": True})

    def _keep(self, entry):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def with_wandb(path: str) -> None:
    sys.modules["wandb"] = Wandb(path)


@pytest.mark.parametrize("pp, microbatches", [(2, 2), (4, 8)])
def test_every_action_of_the_plan_is_in_the_trace_and_the_losses_have_the_same_bits(pp, microbatches, tmp_path):
    flags = (*flags_of(pp, 2, 1, 1, microbatches), *OURS)
    log = tmp_path / "wandb.jsonl"
    wandb = ("--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", str(tmp_path))
    wandb += ("--tensorboard-log-interval", "1")
    bits, run = traced(tmp_path, pp, *flags, *wandb, prepare=partial(with_wandb, str(log)))
    assert bits == losses(pp, *flags)
    document, events = json.loads((run / "trace.json").read_text()), events_of(run)
    assert_valid(events, max(error for step in document["otherData"]["steps"] for error in step["clock_error_us"]))
    shape = PipelineShape(pp, 2, microbatches)
    plan = lower(breadth_first(shape), shape)
    computes = [[str(action) for action in actions if action.op in "FB"] for actions in plan]
    for step in (2, 3):
        for rank, actions in enumerate(plan):
            assert names(events, step, rank, COMPUTE_LANE) == computes[rank]
            found = names(events, step, rank, *(lane for lane in range(len(LANES)) if lane != WAITING))
            assert sorted(found) == sorted(map(str, actions))
            # Every message is waited for.
            receives = {str(action) for action in actions if action.op.startswith("RECV")}
            assert receives <= set(names(events, step, rank, WAITING))
    sent = sum(action.op.startswith("SEND") for actions in plan for action in actions)
    assert sum(event["ph"] == "s" for event in events) == 2 * sent
    _check_files_of_the_run(run, log, shape)


def _check_files_of_the_run(run: Path, log: Path, shape: PipelineShape) -> None:
    header = json.loads((run / "run.json").read_text())
    assert header["format"] == "megatron_bfpp run 1" and header["name"] == "one" and header["arm"] == "breadth-first"
    assert header["shape"] == {
        "pp": shape.pp_size, "chunks": 2, "microbatches": shape.num_microbatches, "dp": 1, "tp": 1, "cp": 1,
        "world_size": shape.pp_size,
    }  # fmt: skip
    assert header["args"]["pipeline_schedule"] == "breadth-first" and header["flops_per_step"] > 0
    tokens, bubble = 32 * shape.num_microbatches, 1 / 5 if shape.pp_size == 2 else 3 / 19
    assert header["tokens_per_step"] == tokens
    assert header["plan"]["bubble_fraction_predicted"] == pytest.approx(bubble)
    assert json.loads((run / "end.json").read_text()) | {"ended": ""} == {
        "status": "finished", "reason": None, "ended": "", "steps": 3,
    }  # fmt: skip
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    measured = steps_of(json.loads((run / "trace.json").read_text()))
    assert [step["step"] for step in steps] == [1, 2, 3] and "bubble_fraction_measured" not in steps[0]
    for step in steps[1:]:
        assert step["bubble_fraction_measured"] == pytest.approx(measured[step["step"]].bubble_fraction)
        assert 0 < step["bubble_fraction_measured"] < 1 and len(step["exposed_p2p_s"]) == shape.pp_size
        assert step["tokens_per_s_per_gpu"] == pytest.approx(tokens / step["step_time_s"] / shape.pp_size)
        assert 0.05 < step["peak_memory_gib_max_rank"] < 20 and 0 <= step["peak_memory_rank"] < shape.pp_size
    assert "planned: " in (run / "timeline.svg").read_text()
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert next(each["config"] for each in told if "config" in each)["pipeline_schedule"] == "breadth-first"
    charts = {each["step"]: each["metrics"] for each in told if each.get("metrics")}
    assert charts[3].keys() == {
        "bfpp/tokens_per_s_per_gpu", "bfpp/peak_memory_gib_max_rank", "bfpp/bubble_fraction_predicted",
        "bfpp/bubble_fraction_measured", "bfpp/exposed_dp_s",
    }  # fmt: skip
    assert charts[3]["bfpp/exposed_dp_s"] == max(steps[2]["exposed_dp_s"])


def test_megatrons_own_schedule_is_traced_too_on_the_first_replica_with_its_waits_for_replicas(tmp_path):
    flags = (*flags_of(2, 2, 1, 2, 4), *ZERO_1, *UNTIED)
    bits, run = traced(tmp_path, 4, *flags)
    assert bits == losses(4, *flags)
    events, order = events_of(run), interleaved_1f1b(PipelineShape(2, 2, 4))
    assert_valid(events, 0.0)
    for rank, actions in enumerate(order):
        assert names(events, 3, rank, COMPUTE_LANE) == [str(action) for action in actions]
        waits = set(names(events, 3, rank, WAITING))
        assert waits == {f"{stage}{op}" for stage in (rank, rank + 2) for op in ("UNSHARD", "REDUCE_GRAD")}
    last = json.loads((run / "steps.jsonl").read_text().splitlines()[-1])
    assert last["exposed_p2p_s"] is None and all(each > 0 for each in last["exposed_dp_s"])
    assert 0 < last["bubble_fraction_measured"] < 1
    assert json.loads((run / "run.json").read_text())["arm"] == "interleaved"


def compare_clocks():
    """The second rank's clock is 5 s ahead. On one machine both read the same one."""
    import time
    from types import SimpleNamespace

    import torch.distributed as dist

    from megatron_bfpp.runtime import clocks

    dist.init_process_group("gloo")
    ahead = 5_000_000_000 * dist.get_rank()
    clocks.time = SimpleNamespace(perf_counter_ns=lambda: time.perf_counter_ns() + ahead)
    offset, error = clocks.offset_to_first(dist.group.WORLD)
    assert abs(offset + ahead) <= error < 1_000_000_000 and (error > 0) == (dist.get_rank() == 1)


def test_the_offset_of_a_clock_is_found_within_the_error_that_is_stated(tmp_path):
    run_job(compare_clocks, 2, tmp_path)


def repeating_every_step() -> None:
    """Mend --rerun-mode report_stats: RerunMode does not know the flag's name, and Megatron 0.17 fails as it prints."""
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    RerunStateMachine._maybe_report_stats = lambda self: None
    RerunMode._missing_ = classmethod(lambda mode, value: mode.REPORT_DETERMINISM_STATS)


@pytest.mark.parametrize(
    "engine, more",
    [
        ("sharded", ("--use-torch-fsdp2",)),
        # Megatron then runs each step twice and compares: the second time is traced.
        ("megatron", ("--breadth-first-engine", "megatron", "--rerun-mode", "report_stats")),
        ("plan", ("--rerun-mode", "report_stats")),
        ("deferred", ("--breadth-first-weight-gradients", "deferred")),
    ],
)
def test_fully_sharded_chunks_megatrons_loop_repeated_steps_and_split_backwards_are_traced(engine, more, tmp_path):
    flags, ranks = (*flags_of(2, 2, 1, 2, 4), *UNTIED, *OURS), 4
    flags += more
    if engine == "plan":  # without replicas
        flags, ranks = (*flags_of(2, 2, 1, 1, 4), *UNTIED, *OURS, *more), 2
    resident = 2 if engine == "sharded" else None
    bits, run = traced(tmp_path, ranks, *flags, prepare=repeating_every_step)
    # Sharded gradients are added up in another order than replicated ones: a run of the same flags, untraced.
    reference = flags if engine == "sharded" else (*flags_of(2, 2, 1, ranks // 2, 4), *UNTIED)
    assert bits == losses(ranks, *reference)
    events, shape = events_of(run), PipelineShape(2, 2, 4)
    assert_valid(events, 10_000.0)
    job = SimpleNamespace(hidden_size=32, seq_length=32, num_attention_heads=4)  # as in gpt.MODEL
    kind = "deferred" if engine == "deferred" else "with-backward"
    order = breadth_first(shape, weight_lag=lags_for(kind, shape, None, True, None, DEFAULT_HOP, times_of(job))[0])
    for rank, actions in enumerate(lower(order, shape, resident_chunks=resident)):
        assert names(events, 3, rank, COMPUTE_LANE) == [str(action) for action in actions if action.op in COMPUTE]
        if engine == "sharded":
            gates = [str(action) for action in actions if action.microbatch is None]
            assert names(events, 3, rank, LANES.index("data-parallel")) == gates
    last = json.loads((run / "steps.jsonl").read_text().splitlines()[-1])
    assert (last["exposed_p2p_s"] is None) == (engine == "megatron") and 0 < last["bubble_fraction_measured"] < 1
    assert engine == "plan" or all(each > 0 for each in last["exposed_dp_s"])
    measured = steps_of(json.loads((run / "trace.json").read_text()))[3]
    assert {op for op in COMPUTE if measured.action_time(op)} == {action.op for rank in order for action in rank}
    assert json.loads((run / "run.json").read_text())["arm"].endswith("breadth-first" if engine == "plan" else engine)
