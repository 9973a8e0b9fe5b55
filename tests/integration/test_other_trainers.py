"""Trainers other than Megatron's: what they leave out, and what they do between the calls of the schedule.

Small chunks (chunks.py) on gloo ranks. Every step is compared bit for bit with Megatron's own interleaved schedule.
docs/guide/trainers.md says which trainer does what.
"""

import copy
import os
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from chunks import Chunk, Run, assert_same, batch, both, chunks, forward_step, schedules, start, step
from jobs import run_job, run_ranks

import megatron_bfpp
from megatron_bfpp.console.errors import UserError
from megatron_bfpp.runtime.p2p import PeerLostError

pytestmark = pytest.mark.slow

TIMEOUT_S, PAUSE_S = 5.0, 7.0  # of the watchdog, for one action; between two steps
VARIABLE = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}


def _partial_arguments() -> None:
    """Megatron's global arguments as a trainer with its own parser sets them: none of our flags, no iteration."""
    from megatron.training import global_vars

    from megatron_bfpp.integration import process

    model, before = chunks(2), process._training_steps
    for args in (SimpleNamespace(), SimpleNamespace(rank=0, distributed_timeout_minutes=1), None):
        global_vars._GLOBAL_ARGS = args
        assert_same(*both(model, 4))
        assert_same(*both(model, 3 * 4, forward_only=True), training=False)
    assert process.ACTIVITY.step == f"evaluation after step {before + 3}", "steps are counted where no trainer does"


def _packed() -> None:
    """Sequences of all lengths in one row, the call's sizes mean nothing, another number of micro-batches each time.

    Log-probabilities come back as data, with gradients enabled and without, before the step that trains.
    """
    model, ranks = chunks(2, **VARIABLE), dist.get_world_size()
    meaningless = {"seq_length": 1, "micro_batch_size": 1}
    for microbatches, seed in ((ranks, 1), (3 * ranks, 2), (2 * ranks, 3), (ranks, 4)):
        lengths = torch.randint(1, 12, (microbatches,), generator=torch.Generator().manual_seed(seed)).tolist()
        data = batch(microbatches, lengths=lengths)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                call = {**meaningless, "forward_only": True, "collect_non_loss_data": True}
                assert_same(*both(model, data, **call), training=False)
        assert_same(*both(model, data, **meaningless))
    # A number of micro-batches that Megatron refuses: the gradients are those of all of them, on one rank.
    data = batch(1, lengths=[7])
    assert step(schedules()[1], model, data, **meaningless).gradients


def _iterators_of_none() -> None:
    """Data that the forward step has from elsewhere: no iterator, as with a data set on some ranks alone."""
    data = [batch(4), batch(4)]
    for run in range(2):
        served: list[dict[int, object]] = []

        def own(_, chunk, served=served):
            return forward_step(served[-1][chunk.vp_stage], chunk)

        model = chunks(2)
        found = []
        for schedule in schedules():
            served.append({chunk: iter(data[run]) for chunk in range(2)})
            found.append(step(schedule, model, data[run], data_iterator=[None, None], forward_step_func=own))
        assert_same(*found)


def _any_report() -> None:
    """A loss function may report what it likes, and a forward-only one may give the output in place of a loss."""

    def reporting(data, chunk):
        return chunk(next(data)), lambda output, **_: (output.square().mean(), [output.detach().clone(), "words"])

    model, found = chunks(2), []
    for schedule in schedules():
        found.append(step(schedule, model, batch(4), forward_step_func=reporting))
    for one, other in zip(found[0].reported, found[1].reported, strict=True):
        assert torch.equal(one[0], other[0]) and one[1] == other[1]
    assert all(map(torch.equal, *(run.gradients for run in found)))

    def whole(data, chunk):
        return chunk(next(data)), lambda output, **_: (output, {"output": output.detach().clone()})

    with torch.no_grad():
        assert_same(*both(model, 4, forward_only=True, forward_step_func=whole), training=False)


def _two_models() -> None:
    """Actor, reference and critic of other sizes and V in one process, whose steps alternate."""
    actor, reference, critic = chunks(2), chunks(3, hidden_size=4), chunks(2, hidden_size=12, **VARIABLE)
    for chunk in reference:
        chunk.requires_grad_(False)
    for microbatches in (4, 8):
        assert_same(*both(reference, microbatches, forward_only=True), training=False)
        assert_same(*both(actor, microbatches))
        assert_same(*both(critic, microbatches))


class Adapted(Chunk):
    """A frozen chunk with an adapter of rank 2 on all stages but those of the first pipeline rank."""

    def __init__(self, config, stage, vp_stage):
        super().__init__(config, stage, vp_stage)
        self.weight.requires_grad_(False)
        self.is_adapted = stage % dist.get_world_size() > 0
        if self.is_adapted:
            shape = config.hidden_size, 2
            self.down = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(50 + stage)))
            self.up = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(70 + stage)))

    def forward(self, given):
        x = given if self.received is None else self.received
        return x + torch.tanh(x @ (self.weight + self.down @ self.up.T) if self.is_adapted else x @ self.weight)


def _frozen_and_adapters() -> None:
    """LoRA: base weights frozen, the first rank trains nothing, so its first output has no graph."""
    default, ours = both(chunks(2, kind=Adapted), 4)
    assert len(ours.gradients) == (0 if dist.get_rank() == 0 else 4)
    assert str(default.reported) == str(ours.reported)
    assert all(map(torch.equal, default.gradients, ours.gradients))


def _offloaded() -> None:
    """Between steps parameters lose their memory, and get it back elsewhere, with other values."""
    model = chunks(2)
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    first = both(model, 4)
    for offload in (_storage_given_up, _data_replaced):
        for value in (0.5, 1.0):
            kept = [parameter.detach().clone() * value for parameter in parameters]
            offload(parameters, kept)
            assert_same(*both(model, 4))
            offload(parameters, [tensor / value for tensor in kept])
        assert_same(first[0], step(schedules()[1], model, batch(4)))


def _storage_given_up(parameters, values) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        storage = parameter.data.untyped_storage()
        size = storage.size()
        storage.resize_(0)
        storage.resize_(size)
        parameter.data.copy_(value)


def _data_replaced(parameters, values) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = torch.empty(0)
        parameter.data = value.clone()


def _interrupted() -> None:
    """A rank fails in the midst of a step, the others wait until their time is up; the next step is as if none had."""
    from megatron.training import global_vars

    from megatron_bfpp.integration import process
    from megatron_bfpp.integration.step import groups

    global_vars._GLOBAL_ARGS = SimpleNamespace(distributed_timeout_minutes=3 / 60)
    groups._channels.clear()
    groups._headers.clear()
    for config in ({}, VARIABLE):
        model, (_, ours) = chunks(2, **config), schedules()
        before, calls = step(ours, model, batch(8)), []

        def fails(data, chunk, calls=calls):
            calls.append(chunk.vp_stage)
            if dist.get_rank() == 0 and len(calls) == 3:
                raise ValueError("out of memory")
            return forward_step(data, chunk)

        with pytest.raises((ValueError, PeerLostError)) as error:
            step(ours, model, batch(8), forward_step_func=fails)
        assert "was running" in "".join(error.value.__notes__)
        assert (dist.get_rank() == 0) == isinstance(error.value, ValueError)
        assert not process.ACTIVITY.is_timed, "whoever catches it may wait"
        for chunk in model:
            chunk.zero_grad()
        dist.barrier()
        assert_same(before, step(ours, model, batch(8)))
        assert_same(*both(model, 4))
    global_vars._GLOBAL_ARGS = None


def _refused() -> None:
    """What breadth-first cannot do raises on every rank at the call, and the next call runs."""
    model, (_, ours) = chunks(2), schedules()
    config = model[0].config
    for name, value in (("overlap_moe_expert_parallel_comm", True), ("cuda_graph_impl", "full_iteration")):
        previous = getattr(config, name)
        setattr(config, name, value)
        with pytest.raises(ValueError, match=name):
            step(ours, model, batch(4))
        setattr(config, name, previous)
    for wrong in ({"data_iterator": None}, {"data_iterator": [None]}):
        with pytest.raises(ValueError, match="must be a list"):
            step(ours, model, batch(4), **wrong)
    assert_same(*both(model, 4))


def _wrapped_and_bare() -> None:
    """Chunks in Megatron's DDP, with and without the hooks that a trainer may set, beside bare ones."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    bare, found = both(chunks(2), 4), []
    for hooks in (False, True):
        model = chunks(2)
        wrapped = [
            DistributedDataParallel(chunk.config, DistributedDataParallelConfig(overlap_grad_reduce=hooks), chunk)
            for chunk in model
        ]
        if hooks:
            model[0].config.no_sync_func = [chunk.no_sync for chunk in wrapped]
        for schedule in schedules():
            for chunk in wrapped:
                chunk.zero_grad_buffer()
            data = batch(4)
            reported = schedule(
                forward_step_func=lambda data, chunk: forward_step(data, chunk.module), model=wrapped,
                data_iterator=[iter(data) for _ in model], num_microbatches=4, seq_length=6, micro_batch_size=2,
            )  # fmt: skip
            for chunk in wrapped:
                chunk.finish_grad_sync()
            gradients = [parameter.main_grad.clone() for chunk in model for parameter in chunk.parameters()]
            found.append(Run(copy.deepcopy(reported), gradients))
    for run in found:
        assert_same(bare[0], run)


CASES = [_partial_arguments, _packed, _iterators_of_none, _any_report, _two_models, _frozen_and_adapters, _offloaded,
         _interrupted, _refused, _wrapped_and_bare]  # fmt: skip


def _all(names: list[str]) -> None:
    """Run all cases in one job, as starting ranks costs more than steps. A failure's traceback names the case."""
    start(num_chunks=2)
    for name in names:
        globals()[name]()
        print(f"shown: {name}", flush=True)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.skipif(
    not os.environ.get("BFPP_ALL_CASES"), reason="more ranks; with BFPP_ALL_CASES=1"))])  # fmt: skip
def test_every_case_gives_the_bits_of_megatrons_schedule(ranks, tmp_path):
    names = [case.__name__ for case in CASES]
    for output in run_job(_all, ranks, tmp_path, names):
        assert [line.removeprefix("shown: ") for line in output.splitlines() if line.startswith("shown: ")] == names


def _begin(num_chunks: int | None, **args: object) -> None:
    """Meet as a trainer with Megatron's global arguments but none of Megatron's loop does."""
    from megatron.core import parallel_state
    from megatron.training import global_vars

    global_vars._GLOBAL_ARGS = SimpleNamespace(**args) if args else None
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=num_chunks
    )


def _watched(has_arguments: bool) -> None:
    """Train with a watchdog, and wait between steps for longer than an action may take, in the optimizer and after."""
    from megatron_bfpp.integration import process, seams
    from megatron_bfpp.integration.reliability import watch

    megatron_bfpp.enable("breadth-first", device="cpu")
    if has_arguments:  # what differs between the ranks of such a trainer is its own
        _begin(2, bfpp_timeout_seconds=TIMEOUT_S, node=dist.get_rank)
    else:
        os.environ["BFPP_TIMEOUT_SECONDS"] = str(TIMEOUT_S)
        _begin(2)
    assert seams.is_applied(watch.WATCHDOG)
    model, (_, ours) = chunks(2), schedules()
    first = step(ours, model, batch(4))
    assert not process.ACTIVITY.is_timed, "no step runs"
    time.sleep(PAUSE_S)
    assert_same(first, step(ours, model, batch(4)))


@pytest.mark.parametrize("has_arguments", [True, False])
def test_a_pause_between_steps_is_not_timed(has_arguments, tmp_path):
    run_job(_watched, 2, tmp_path, has_arguments)


def _stuck() -> None:
    """Wait in the second step of rank 1, for whom rank 0 waits."""
    os.environ["BFPP_TIMEOUT_SECONDS"] = str(TIMEOUT_S)
    megatron_bfpp.enable("breadth-first", device="cpu")
    _begin(2)
    model, (_, ours) = chunks(2), schedules()
    step(ours, model, batch(4))
    if dist.get_rank() == 1:
        model[0].register_forward_hook(lambda *given: time.sleep(60))
    step(ours, model, batch(4))


def test_a_step_that_stands_still_ends_without_megatrons_arguments(tmp_path):
    codes, outputs = run_ranks(_stuck, 2, tmp_path)
    assert all(codes), codes
    words = ("rank 1 (pp_rank 1)", f"may take {TIMEOUT_S:g} s")
    assert any(all(word in each for word in words) for each in outputs), outputs[0][-2000:]


def _without_chunks() -> None:
    os.environ["BFPP_PIPELINE_SCHEDULE"] = "breadth-first"
    megatron_bfpp.enable(device="cpu")
    with pytest.raises(
        UserError, match="needs at least 2 model chunks per rank, but there are 1 on each of 2 pipeline"
    ):
        _begin(None)
    print("refused")


def _with_another_schedule() -> None:
    megatron_bfpp.enable("breadth-first" if os.environ["RANK"] == "0" else "1f1b", device="cpu")
    with pytest.raises(UserError, match="choice of schedule is 1f1b on rank 1 and breadth-first on rank 0"):
        _begin(2)
    print("refused")


@pytest.mark.parametrize("job", [_without_chunks, _with_another_schedule])
def test_without_a_command_line_a_refusal_reaches_every_rank_before_a_model_is_built(job, tmp_path):
    for output in run_job(job, 2, tmp_path):
        assert "refused" in output
