"""The observers of the GPU trial: they change no result, and see what the judges read.

The quick tests run the real executor and messages on torch's fake process group; the slow one trains in real ranks.
"""

import json
from contextlib import nullcontext
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import recorded
import torch
from jobs import run_job

from megatron_bfpp.compare.runs import read
from megatron_bfpp.doctor.gpu_trial import judges, kernels
from megatron_bfpp.doctor.gpu_trial.shapes import QUIET_STEPS, positions_of, turns_of
from megatron_bfpp.doctor.jobs import tiny
from megatron_bfpp.integration import seams
from megatron_bfpp.integration.flags.settings import Settings
from megatron_bfpp.runtime.p2p import Messages
from megatron_bfpp.schedule import PipelineShape
from megatron_bfpp.schedule.costs import UNIT

SHAPE = PipelineShape(2, 2, 4)
PLAN = Settings(schedule="breadth-first").plan_of(SHAPE).actions


@pytest.fixture
def rank(monkeypatch):
    """The module of the observers, for a job at its first of three steps. Its `args` are Megatron's."""
    from megatron_bfpp.doctor.gpu_trial import rank

    args = SimpleNamespace(pipeline_schedule="breadth-first", curr_iteration=0, train_iters=3)
    monkeypatch.setattr(rank, "megatron_args", lambda: args)
    monkeypatch.setattr(rank, "_profiled", lambda path: nullcontext())
    monkeypatch.setattr(rank, "args", args, raising=False)
    yield rank
    for name in ("walk", "observation", "messages", "silence"):
        seams.undo(f"the trial's {name}")


def step(pp_rank: int, recorder: recorded.Recorder | None = None) -> recorded.Recorder:
    """Run one step of a rank on the fake process group; return what it launched."""
    return recorded._record(
        recorder or recorded.Recorder(pp_rank, SHAPE), PLAN[pp_rank], SHAPE, UNIT, False, False, False
    )


@pytest.mark.parametrize("pp_rank", [0, 1])
def test_the_walk_waits_once_before_each_action_of_this_rank(rank, pp_rank, tmp_path, monkeypatch):
    rank.walk(tmp_path)
    places = []  # before which the device was waited for
    for _ in range(QUIET_STEPS + len(positions_of(PLAN)) + 1):
        recorder = recorded.Recorder(pp_rank, SHAPE)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda recorder=recorder: places.append(len(recorder.begins)))
        step(pp_rank, recorder)
        assert len(recorder.begins) == len(PLAN[pp_rank])
    assert places == list(range(len(PLAN[pp_rank])))
    if pp_rank == 0:  # the first rank notes what is about to happen
        begun = [json.loads(line) for line in (tmp_path / "walk.jsonl").read_text().splitlines()]
        wanted = positions_of(PLAN)
        assert [(each["pp_rank"], each["position"]) for each in begun] == wanted


def observed(rank, tmp_path) -> dict:
    for rank.args.curr_iteration in range(3):
        step(1)
    return json.loads((tmp_path / "rank1.json").read_text())


def test_a_step_is_timed_and_its_messages_are_counted(rank, tmp_path):
    rank.observe(tmp_path)
    found = observed(rank, tmp_path)
    # Each of the 12 forward and 12 backward messages has one of its two ends here.
    assert (found["pp_rank"], found["messages"], found["alive"]) == (1, 24, 0)
    assert found["actions"] == len(PLAN[1]) and found["host_s"] > 0


def test_a_message_that_outlives_the_step_is_counted(rank, tmp_path, monkeypatch):
    kept, receive = [], Messages.receive
    monkeypatch.setattr(Messages, "receive", lambda self, action: kept.append(receive(self, action)) or kept[-1])
    rank.observe(tmp_path)
    assert observed(rank, tmp_path)["alive"] == 12


def test_a_silent_step_computes_as_much_and_sends_nothing(rank, tmp_path):
    def computed(recorder):
        names = [each.name for each in recorder.programme if each.stream == recorded.COMPUTE]
        return [name for name in names if "wait" not in name]

    loud = step(1)
    rank.silent(tmp_path)
    quiet = step(1)
    assert computed(loud) == computed(quiet) and len(computed(loud)) == 16
    messages = [[each for each in recorder.programme[recorder.begins[0] :] if each.end] for recorder in (loud, quiet)]
    assert [len(each) for each in messages] == [24, 0]


def in_rank(observers: str, folder: str, words: list[str]) -> None:
    from megatron_bfpp.doctor.gpu_trial.rank import train
    from megatron_bfpp.run import launch

    launch(words, partial(train, observers, folder))


def ran(folder: Path, observers: str, microbatches: int, steps: int) -> int:
    """Train in two ranks under observers; return the number of steps."""
    folder.mkdir()
    words = ["--device", "cpu", *tiny(2, 2, microbatches, steps), "--pipeline-schedule", "breadth-first"]
    run_job(in_rank, 2, folder, observers, str(folder), [*words, "--bfpp-run-dir", str(folder)])
    return len(read(folder).steps)


@pytest.mark.slow
def test_arms_take_turns_in_one_job_with_sizes_ahead_of_messages_and_the_profile_names_every_action(tmp_path):
    pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
    turns = list(islice(cycle(turns_of(2, 2)), 9))
    assert ran(tmp_path / "arms", "arms,variable", 8, 9) == 9
    begun = [json.loads(line) for line in (tmp_path / "arms" / "arms.jsonl").read_text().splitlines()]
    assert [(each["step"], each["arm"], each["microbatches"]) for each in begun] == [
        (number, *turn) for number, turn in enumerate(turns, 1)
    ]
    assert ran(tmp_path / "observed", "observe", 4, 2) == 2
    for pp_rank in range(2):
        trace = tmp_path / "observed" / f"rank{pp_rank}.trace.json"
        events = json.loads(trace.read_text())["traceEvents"]
        actions = sorted((each["ts"], each["name"]) for each in events if each["name"].startswith("PP:"))
        assert [name for _, name in actions] == [f"PP:{action}" for action in PLAN[pp_rank]]
        found = json.loads((tmp_path / "observed" / f"rank{pp_rank}.json").read_text())
        # Megatron's layers hold their last input with its gradient. The first stage has none.
        assert (found["messages"], found["alive"], found["chunks"]) == (24, 2 + 2 * pp_rank, 2)
        # A CPU has no kernels: the judge says so, instead of finding everything in order.
        product = next(each for each in events if each["name"] == "aten::mm")
        assert kernels.read(trace) == []
        assert judges.host({"ranks": [{**found, "kernels": []}]}).wrong == ["rank 0: its trace has no kernels"]
        launch = {"ph": "X", "cat": "cuda_runtime", "ts": product["ts"], "dur": 1, "args": {"correlation": 7}}
        kernel = {"ph": "X", "cat": "kernel", "name": "ampere_sgemm", "ts": 1, "dur": 2, "args": {"correlation": 7}}
        (made,) = kernels.kernels_of([*events, launch, kernel])
        assert made.kind == "gemm" and f"PP:{made.action}" in dict(map(reversed, actions))
