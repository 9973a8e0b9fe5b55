"""What Megatron's interleaved schedule does with its arguments and its config, field by field, breadth-first does too.

Each test runs one step of small chunks (chunks.py) under both schedules in the same processes.
docs/reference/megatron_features.md has one line per feature.
"""

import contextlib
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from chunks import assert_same, batch, both, chunks, forward_step, mean_square, schedules, start, step
from jobs import run_job

pytestmark = pytest.mark.slow

MICROBATCHES = 4


def _variable_lengths() -> None:
    lengths = [6, 2, 8, 4]
    assert_same(
        *both(chunks(2, variable_seq_lengths=True, moe_token_dispatcher_type="alltoall"), batch(4, lengths=lengths))
    )


def _kept_outputs() -> None:
    freed, kept = (both(chunks(2, deallocate_pipeline_outputs=free), MICROBATCHES) for free in (True, False))
    assert_same(*freed)
    assert_same(*kept)
    assert_same(freed[0], kept[1])


def _batched_p2p() -> None:
    assert_same(*both(chunks(2, overlap_p2p_comm=False, batch_p2p_comm=dist.get_world_size() > 2), MICROBATCHES))


def _partial_checkpointing() -> None:
    """Of a window of micro-batches the first 2 are checkpointed in part. The window is that of the order: with all
    micro-batches in one group Megatron's order is ours."""

    def asked(data, chunk, checkpoints_all):
        chunk.seen.append((chunk.vp_stage, checkpoints_all))
        return forward_step(data, chunk)

    fields = {
        "num_microbatches_with_partial_activation_checkpoints": 2,
        "microbatch_group_size_per_vp_stage": MICROBATCHES,
    }
    default, ours = both(chunks(2, **fields), MICROBATCHES, forward_step_func=asked)
    assert_same(default, ours)
    flags = [[entry for entry in run.seen if isinstance(entry[1], bool)] for run in (default, ours)]
    assert flags[0] == flags[1] and len(flags[0]) == 2 * MICROBATCHES
    assert {flag for _, flag in flags[0]} == {False, True}


def _evaluation_and_other_data() -> None:
    model = chunks(2)
    assert_same(*both(model, MICROBATCHES, forward_only=True), training=False)
    assert_same(*both(model, 3 * MICROBATCHES, forward_only=True), training=False)
    default, ours = both(model, MICROBATCHES, forward_only=True, collect_non_loss_data=True)
    assert_same(default, ours, training=False)
    assert all(set(report) == {"output"} for report in ours.reported)


def _first_validation_step() -> None:
    """Show that chunks learn of their first micro-batch (fp8 weights are cast then), in evaluation only on request."""
    model = chunks(2)
    for call, times in (({}, 2), ({"forward_only": True, "first_val_step": True}, 2),
                        ({"forward_only": True, "first_val_step": False}, 0)):  # fmt: skip
        default, ours = both(model, MICROBATCHES, **call)
        assert sorted(default.seen) == sorted(ours.seen) and len(ours.seen) == times, (call, default.seen, ours.seen)


def _groups_of_the_caller() -> None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = chunks(2)
    config, finalized = model[0].config, []
    config.finalize_model_grads_func = lambda model, tokens, pg_collection, force_all_reduce: finalized.append(
        (pg_collection is groups, force_all_reduce)
    )
    p2p = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
    assert_same(*both(model, MICROBATCHES, p2p_communicator=p2p, pg_collection=groups, force_all_reduce=True))
    assert finalized == [(True, True)] * 2
    for only in ({"p2p_communicator": p2p}, {"pg_collection": groups}):
        for schedule in schedules():
            with pytest.raises(ValueError):
                step(schedule, model, batch(MICROBATCHES), **only)


def _tokens() -> None:
    """The loss function may count tokens; finalize_model_grads divides by their sum over the step."""

    def counting(data, chunk):
        output, _ = forward_step(data, chunk)
        return output, partial(summed, chunk)

    def summed(chunk, output):
        loss, report = mean_square(chunk, output)
        return loss * 7, torch.tensor(7, dtype=torch.int), report

    for per_token in (False, True):
        model, finalized = chunks(2, calculate_per_token_loss=per_token), []
        model[0].config.finalize_model_grads_func = lambda _, tokens, seen=finalized, **__: seen.append(tokens)
        assert_same(*both(model, MICROBATCHES, forward_step_func=counting))
        is_last = dist.get_rank() == dist.get_world_size() - 1
        expected = (7 * MICROBATCHES if is_last else 0) if per_token else None
        assert [tokens if tokens is None else tokens.item() for tokens in finalized] == [expected] * 2


def _gradient_and_parameter_hooks() -> None:
    """One reduction and one gather per chunk and step, nothing reduced before its chunk's last backward; the config is
    as before at the end."""
    for listed in (True, False):
        model = chunks(2)
        config, calls = model[0].config, []
        of = {id(next(chunk.parameters())): chunk.vp_stage for chunk in model}

        def sync(kind, parameters, of=of, calls=calls):
            calls.append((kind, of[id(next(iter(parameters)))]))

        hooks = {f"{kind}_sync_func": [partial(sync, kind)] * 2 if listed else partial(sync, kind)
                 for kind in ("grad", "param")}  # fmt: skip
        no_sync = contextlib.nullcontext
        hooks["no_sync_func"] = [no_sync, no_sync] if listed else no_sync
        for name, value in hooks.items():
            setattr(config, name, value)
        counts = []
        for schedule in schedules():
            calls.clear()
            step(schedule, model, batch(MICROBATCHES))
            counts.append(Counter(calls))
            calls.clear()
            step(schedule, model, batch(MICROBATCHES), forward_only=True)
            assert not calls
        assert counts[0] == counts[1] == Counter((kind, chunk) for kind in ("grad", "param") for chunk in range(2))
        assert all(getattr(config, name) == value for name, value in hooks.items() if listed)


def _timers() -> None:
    seen: list[tuple[str, str]] = []

    def timers(name, log_level=None):
        def note(what):
            return lambda barrier=False: seen.append((name, what))

        return SimpleNamespace(start=note("start"), stop=note("stop"))

    model, counts = chunks(2), []
    model[0].config.timers = timers
    for schedule in schedules():
        seen.clear()
        step(schedule, model, batch(MICROBATCHES))
        counts.append(Counter(seen))
    names = ["forward-backward", "forward-compute", "backward-compute"]
    assert {name for name, _ in counts[1]} == set(names), "no time is taken of messages: nobody waits for them there"
    for name in names:
        for what in ("start", "stop"):
            assert counts[0][name, what] == counts[1][name, what] == (1 if name == names[0] else 2 * MICROBATCHES)


def _nvtx() -> None:
    from megatron.core.utils import configure_nvtx_profiling

    ranges: list[str] = []
    depth: list[int] = [0]

    def push(message):
        ranges.append(message)
        depth[0] += 1

    def pop():
        depth[0] -= 1
        assert depth[0] >= 0

    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = push, pop
    configure_nvtx_profiling(True)
    step(schedules()[1], chunks(2), batch(MICROBATCHES))
    configure_nvtx_profiling(False)
    rank, size = dist.get_rank(), dist.get_world_size()
    stages = [rank, size + rank]
    expected = {f"PP:{stage}{op}{microbatch}" for stage in stages for op in "FB" for microbatch in range(MICROBATCHES)}
    assert sorted(name for name in ranges if re.fullmatch(r"PP:\d+[FB]\d+", name)) == sorted(expected) and depth[0] == 0


def _autocast() -> None:
    """Megatron asks for autocast on "cuda": on a CPU this is what it does there."""
    plain = both(chunks(2), MICROBATCHES)
    cuda = torch.autocast
    torch.autocast = lambda device, dtype: cuda("cpu", dtype=dtype)
    cast = both(chunks(2, enable_autocast=True, autocast_dtype=torch.bfloat16), MICROBATCHES)
    torch.autocast = cuda
    assert_same(*cast)
    assert not torch.equal(plain[1].gradients[0], cast[1].gradients[0])


def _paged_stash() -> None:
    from megatron.core.pipeline_parallel import schedules as megatron

    if not hasattr(megatron, "paged_stash_reset"):
        return  # 0.17 has none
    model, calls = chunks(2), []
    model[0].config.moe_paged_stash = True
    megatron.paged_stash_reset = lambda enabled, config: calls.append(enabled)
    both(model, MICROBATCHES)
    both(model, MICROBATCHES, forward_only=True)
    assert calls == [True, True, False, False]


def _twice() -> None:
    """Nothing is left over from one call to the next; the rerun state machine relies on it."""
    model, (_, ours) = chunks(2), schedules()
    first = step(ours, model, batch(MICROBATCHES))
    assert_same(first, step(ours, model, batch(MICROBATCHES)))
    assert_same(*both(model, 3 * MICROBATCHES))
    assert_same(first, step(ours, model, batch(MICROBATCHES)))


TWO_RANKS = [_variable_lengths, _kept_outputs, _batched_p2p, _partial_checkpointing, _evaluation_and_other_data,
             _first_validation_step, _groups_of_the_caller, _tokens, _gradient_and_parameter_hooks, _timers, _nvtx,
             _autocast, _paged_stash, _twice]  # fmt: skip
FOUR_RANKS = [_variable_lengths, _kept_outputs, _batched_p2p, _partial_checkpointing, _evaluation_and_other_data,
              _tokens,
              _gradient_and_parameter_hooks, _timers]  # fmt: skip


def _all(names: list[str]) -> None:
    """Run all features in one job, as starting ranks costs more than steps. A failure's traceback names the feature."""
    start(num_chunks=2)
    for name in names:
        globals()[name]()
        print(f"shown: {name}", flush=True)


@pytest.mark.parametrize(("ranks", "features"), [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_schedule_features(ranks, features, tmp_path):
    names = [feature.__name__ for feature in features]
    for output in run_job(_all, ranks, tmp_path, names):
        assert [line.removeprefix("shown: ") for line in output.splitlines() if line.startswith("shown: ")] == names
