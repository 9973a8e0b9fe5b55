"""Orders: small ones written out, properties of all of them, equality with Megatron's tables."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import shapes, text

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.schedule import Action, Op, PipelineShape, breadth_first, forward_only, interleaved_1f1b, simulate


def test_late_backward_of_2_ranks_2_chunks_2_microbatches():
    assert text(breadth_first(PipelineShape(2, 2, 2), eager_backward=False)) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1",
    ]


def test_eager_backward_starts_on_the_last_rank_after_its_first_loss():
    assert text(breadth_first(PipelineShape(2, 2, 2))) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]


def test_evaluation_is_the_forward_half():
    assert text(forward_only(PipelineShape(2, 2, 2))) == ["0F0 0F1 2F0 2F1", "1F0 1F1 3F0 3F1"]


@given(shapes, st.data(), st.booleans())
@settings(deadline=None)
def test_every_stage_runs_each_microbatch_once_forward_and_once_backward_in_order(shape, data, eager):
    group = data.draw(st.none() | st.integers(1, shape.num_microbatches))
    for rank, actions in enumerate(breadth_first(shape, group, eager)):
        assert len(actions) == 2 * shape.num_chunks * shape.num_microbatches
        for stage in shape.stages_on(rank):
            for op in (Op.F, Op.B):
                found = [action.microbatch for action in actions if action[:2] == (stage, op)]
                assert found == list(range(shape.num_microbatches))


@given(shapes, st.data(), st.booleans())
@settings(deadline=None)
def test_step_time_is_that_of_the_exact_formula_for_every_group_that_fills_the_pipeline(shape, data, eager):
    size, chunks, microbatches = shape.pp_size, shape.num_chunks, shape.num_microbatches
    groups = st.none() | st.integers(size, microbatches) if microbatches >= size else st.none()
    timeline = simulate(breadth_first(shape, data.draw(groups), eager), shape, forward=1, backward=2)
    assert timeline.step_time == 3 * ((chunks - 1) * max(microbatches, size) + microbatches + size - 1)


@given(shapes, st.data())
@settings(deadline=None)
def test_an_eager_backward_never_needs_more_live_activations(shape, data):
    group = data.draw(st.none() | st.integers(1, shape.num_microbatches))
    eager, late = (
        simulate(breadth_first(shape, group, is_eager), shape).peak_live_activations() for is_eager in (True, False)
    )
    assert all(fewer <= more for fewer, more in zip(eager, late, strict=True))


def test_groups_of_p_need_less_memory_than_all_microbatches():
    shape = PipelineShape(4, 4, 16)
    by_groups = simulate(breadth_first(shape, 4), shape).peak_live_activations()
    assert by_groups == [19, 17, 15, 13]  # 2 (P-r-1) + (V-1) P + 1
    assert simulate(breadth_first(shape), shape).peak_live_activations() == [55, 53, 51, 49]


@pytest.mark.parametrize("group", [0, -1, 9])
def test_a_group_outside_1_to_m_is_refused_with_its_numbers(group):
    with pytest.raises(UserError, match=rf"group is {group}; it must lie between 1 and the 8"):
        breadth_first(PipelineShape(4, 2, 8), group)


@pytest.mark.parametrize("sizes", [(1, 2, 8), (4, 0, 8), (4, 2, 0), (4, 2, 1.5)])
def test_a_shape_that_cannot_be_is_refused(sizes):
    with pytest.raises(UserError, match="must be an integer of at least"):
        PipelineShape(*sizes)


def test_interleaved_1f1b_equals_the_tables_of_megatron_core():
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules", reason="needs megatron-core")
    compared = 0
    for size in range(2, 9):
        for chunks in range(2, 5):
            for microbatches in range(size, 18):
                for group in range(size, microbatches + 1):
                    if 0 < microbatches % group < size:
                        continue
                    shape = PipelineShape(size, chunks, microbatches)
                    expected = [_megatron_order(schedules, shape, rank, group) for rank in range(size)]
                    assert interleaved_1f1b(shape, group) == expected
                    compared += 1
    assert compared > 900


def _megatron_order(schedules, shape, rank, group):
    pp_group = SimpleNamespace(size=lambda: shape.pp_size, rank=lambda: rank)
    communicator = SimpleNamespace(pp_group=pp_group, virtual_pipeline_model_parallel_size=shape.num_chunks)
    total, _, warmup, remaining = schedules.get_pp_rank_microbatches(
        shape.num_microbatches, shape.num_chunks, group, p2p_communicator=communicator
    )
    table = schedules.get_schedule_table(shape.num_microbatches, shape.num_chunks, group)
    forwards = [Action(chunk * shape.pp_size + rank, Op.F, mb) for mb, chunk in table]
    backwards = [Action((shape.num_chunks - 1 - chunk) * shape.pp_size + rank, Op.B, mb) for mb, chunk in table]
    steady = [action for pair in zip(forwards[warmup:], backwards[:remaining]) for action in pair]
    assert len(forwards) == total
    return forwards[:warmup] + steady + backwards[remaining:]


@pytest.mark.parametrize("sizes", [(2, 1, 1), (4, 3, 5), (3, 2, 8), (8, 4, 2)])
def test_the_forward_order_is_that_of_torchs_looped_bfs(sizes):
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules", reason="needs torch")
    shape = PipelineShape(*sizes)
    schedule = object.__new__(pipelining.ScheduleLoopedBFS)
    schedule.pp_group_size, schedule._n_microbatches, schedule._stages = sizes[0], sizes[2], [None] * sizes[1]
    for rank, actions in enumerate(breadth_first(shape, eager_backward=False)):
        theirs = [str(action) for action in schedule._calculate_single_rank_operations(rank) if action is not None]
        ours = list(map(str, actions))
        forwards = sizes[1] * sizes[2]
        assert ours[:forwards] == theirs[:forwards]
        # The backwards differ by design: torch reverses the microbatches, and with them the order of accumulation.
        assert sorted(ours[forwards:]) == sorted(theirs[forwards:])
