"""Replaying a plan: its messages and reductions take their time, and nothing else does."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import parse, shapes

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.schedule import (
    Action,
    Op,
    PipelineShape,
    ScheduleError,
    breadth_first,
    forward_only,
    interleaved_1f1b,
    lower,
    one_f_one_b,
    simulate,
)
from megatron_bfpp.schedule.costs import MEGATRON, OURS, TORCH, Costs
from megatron_bfpp.schedule.lower import add_send_recv, aligned
from megatron_bfpp.schedule.replay import replay


@given(shapes, st.data(), st.booleans(), st.sampled_from([1.0, 2.0, 3.0]))
@settings(deadline=None, max_examples=60)
def test_without_a_network_a_plan_takes_what_its_order_takes(shape, data, eager, backward):
    order = breadth_first(shape, data.draw(st.none() | st.integers(1, shape.num_microbatches)), eager)
    expected = simulate(order, shape, backward=backward)
    found = replay(lower(order, shape), shape, Costs(backward=backward))
    assert found.step_time == expected.step_time
    assert found.peak_live_activations() == expected.peak_live_activations()
    # Receives are placed for backwards of two forwards and messages of a quarter of one. With shorter ones a send can
    # wait in idle time (the next test).
    assert backward < 2 or shape.pp_size >= 5 or found.spans == expected.spans


EVERY_SHAPE = list(product(range(2, 9), range(1, 5), range(1, 25)))


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
def test_with_short_backwards_a_send_waits_only_on_5_ranks_or_more_and_only_in_idle_time(eager):
    """`lower` places receives by a clock on which a backward takes two forwards and a message a quarter of one; here a
    backward takes one and a message nothing.

    The first gradient of a chunk goes from rank 0 around the ring to the last rank, P-1 backwards and messages after
    that rank made its own. Meanwhile the last rank runs 2 actions per forward and backward: with b and c the times of a
    backward and of a message, 2 (P-1) (b + c) / (1 + b) of them. On the clock of `lower`, with 2 and 1/4, that is P/2
    more than with 1 and 0, and it posts the receive so many actions later. The sender waits from 2 (SEND_WINDOW) on,
    thus for P >= 5. The pipeline must be in its steady state by then: V >= 2 and M >= 2P. The wait falls in time in
    which rank 0 idles anyway.
    """
    waiting = set()
    for sizes in EVERY_SHAPE:
        shape = PipelineShape(*sizes)
        order = breadth_first(shape, eager_backward=eager)
        expected = simulate(order, shape, backward=1.0)
        found = replay(lower(order, shape), shape, Costs(backward=1.0))
        assert found.step_time == expected.step_time, shape
        assert found.peak_live_activations() == expected.peak_live_activations(), shape
        if found.spans != expected.spans:
            waiting.add(sizes)
    assert len(EVERY_SHAPE) == 672
    steady = {sizes for sizes in EVERY_SHAPE if sizes[0] >= 5 and sizes[1] >= 2 and sizes[2] >= 2 * sizes[0]}
    assert waiting == (steady if eager else set())


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("hop", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("eager", [True, False])
def test_latency_up_to_the_spare_microbatches_is_hidden_except_for_fill_and_drain(pp, chunks, times, hop, eager):
    shape = PipelineShape(pp, chunks, times * pp)  # M >= P (1 + hop / forward)
    found = replay(lower(breadth_first(shape, eager_backward=eager), shape), shape, Costs(hop=hop))
    bound = 3 * (shape.num_microbatches * chunks + pp - 1) + 2 * (pp - 1) * hop
    assert found.step_time == pytest.approx(bound, rel=1e-9)
    assert sum(found.waiting()) > 0


def test_megatrons_default_order_exposes_the_latency_at_every_group():
    shape = PipelineShape(4, 4, 8)
    ours, default = (
        replay(lower(order, shape), shape, Costs(hop=0.5)).step_time
        for order in (breadth_first(shape), interleaved_1f1b(shape))
    )
    assert default > 1.1 * ours


def test_a_message_begins_when_its_receive_is_posted_and_waits_for_the_one_before_it():
    shape = PipelineShape(2, 1, 2)
    plan = parse(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1",
        "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    )
    spans = replay(plan, shape, Costs(forward=1, backward=1, transfer=5, hop=1)).spans
    starts = {str(span.action): span.start for rank in spans for span in rank}
    # 0F0 ends at 1, its transfer at 6; 0F1 ends at 2, but its message leaves at 6 and takes until 11.
    assert (starts["1F0"], starts["1F1"]) == (7, 12)
    # The gradient of microbatch 0 leaves when rank 1 has it, at 9, and is posted long before: 9 + 5 + 1.
    assert starts["0B0"] == 15


def test_a_receive_that_is_posted_late_holds_its_message_back():
    shape = PipelineShape(2, 1, 1)
    early = parse("0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0")
    assert replay(early, shape, Costs(1, 1, hop=3)).step_time == 1 + 3 + 1 + 1 + 3 + 1


def test_a_reduction_runs_beside_the_next_chunk_and_the_last_one_is_exposed():
    shape = PipelineShape(2, 4, 4)
    plan = lower(breadth_first(shape), shape)
    alone = replay(plan, shape).step_time
    # As long as the 4 backwards of the next chunk: three of four are hidden on every rank.
    found = replay(plan, shape, Costs(reduction=8))
    assert found.step_time == alone + 8 and found.exposed_reduction == 8
    longer = replay(plan, shape, Costs(reduction=20))
    assert longer.exposed_reduction > 20  # they no longer fit under the backwards, and queue


def test_a_gather_is_waited_for_by_the_first_forward_of_its_chunk():
    shape = PipelineShape(2, 2, 4)
    plan = lower(breadth_first(shape), shape)
    assert replay(plan, shape, Costs(gather=2)).step_time == replay(plan, shape).step_time + 2


@pytest.mark.parametrize("sizes", [(4, 4, 8), (4, 2, 8), (8, 4, 16), (2, 3, 4)])
def test_a_reduction_as_long_as_the_backwards_of_its_chunk_is_exposed_as_the_arithmetic_says(sizes):
    shape = PipelineShape(*sizes)
    pp, chunks, microbatches = sizes
    costs = Costs(1, 2, reduction=2 * microbatches)
    # The default leaves P backwards between the ends of two chunks, breadth-first M. Both expose the last reduction.
    order, plan = interleaved_1f1b(shape), lower(breadth_first(shape), shape)
    assert replay(plan, shape, costs).exposed_reduction == 2 * microbatches
    default = replay(lower(order, shape), shape, costs).exposed_reduction
    assert default == (chunks * microbatches - (chunks - 1) * pp) * 2
    assert replay(aligned(lower(order, shape), shape), shape, costs).exposed_reduction == default


def test_buckets_of_the_first_stage_are_reduced_during_its_last_backward_and_gathered_during_its_first_forward():
    shape = PipelineShape(2, 2, 4)
    plan = lower(breadth_first(shape), shape)
    alone = replay(plan, shape).step_time
    # A quarter is there before the first forward can start, and a quarter is left after the last backward.
    found = replay(plan, shape, Costs(1, 2, gather=1, reduction=2, buckets=4))
    assert found.step_time == pytest.approx(alone + 1 / 4 + 2 / 4)
    assert found.exposed_reduction == pytest.approx(2 / 4)


def test_a_gather_that_the_plan_does_not_launch_is_exposed():
    shape = PipelineShape(2, 1, 4)
    plan = [[each for each in actions if each.op is not Op.UNSHARD] for actions in lower(breadth_first(shape), shape)]
    assert replay(plan, shape, Costs(gather=2)).step_time == replay(plan, shape).step_time + 2 * 2  # at each stage


def test_full_sharding_hides_its_second_gather_under_the_backwards_of_the_next_chunk():
    shape = PipelineShape(2, 3, 4)
    replicated, sharded = lower(breadth_first(shape), shape), lower(breadth_first(shape), shape, resident_chunks=2)
    alone = replay(replicated, shape).step_time
    # A reduction and a gather under 4 backwards of 2: as without sharding, the first gather and the last reduction are
    # exposed.
    hidden = Costs(1, 2, gather=3, reduction=4)
    assert replay(sharded, shape, hidden).step_time == replay(replicated, shape, hidden).step_time == alone + 3 + 4
    # Too long for that, and each of V - 2 = 1 chunks that are gathered again exposes what is too much.
    longer = Costs(1, 2, gather=4, reduction=7)
    assert replay(sharded, shape, longer).step_time >= replay(replicated, shape, longer).step_time + 3
    units = Costs(1, 2, gather=3, reduction=4, buckets=4)
    assert replay(sharded, shape, units).step_time < alone + 3 + 4


def test_torch_waits_for_the_reduction_of_a_stage_in_its_last_backward():
    shape = PipelineShape(2, 1, 4)
    plan = add_send_recv(breadth_first(shape), shape)
    assert replay(plan, shape, Costs(reduction=8), TORCH).step_time == replay(plan, shape).step_time + 2 * 8


def test_megatron_launches_reductions_and_gathers_at_one_time_on_all_ranks():
    shape = PipelineShape(4, 4, 8)
    plan = lower(interleaved_1f1b(shape), shape)
    found = aligned(plan, shape)
    assert [sorted(actions) for actions in found] == [sorted(actions) for actions in plan]
    for rank, actions in enumerate(found):
        backwards = [each for each in actions if each.op is Op.B]
        for stage in shape.stages_on(rank):
            before = actions[: actions.index(Action(stage, Op.REDUCE_GRAD))]
            ran = sum(each.op is Op.B for each in before)
            assert ran == min(backwards.index(Action(stage, Op.B, 7)) + 1 + rank, len(backwards))


def test_a_send_that_is_waited_for_stands_in_the_way_of_the_next_action():
    # What Megatron's own loop does with every output, and why the same order takes longer there.
    shape, costs = PipelineShape(4, 4, 8), Costs(hop=0.1, transfer=0.4)
    plan = lower(breadth_first(shape), shape)
    ours, megatrons = (replay(plan, shape, costs, waits).step_time for waits in (OURS, MEGATRON))
    assert ours == pytest.approx(3 * (8 * 4 + 3) + 6 * 0.5) and megatrons > 1.08 * ours
    assert replay(plan, shape, Costs(hop=0.5), MEGATRON).step_time == pytest.approx(ours)


def test_1f1b_without_chunks_takes_what_the_textbook_says():
    shape = PipelineShape(4, 1, 8)
    assert replay(lower(one_f_one_b(shape), shape), shape).step_time == 3 * (8 + 3)
    with pytest.raises(UserError, match="1F1B has one model chunk per rank, not 2"):
        one_f_one_b(PipelineShape(4, 2, 8))


def test_stages_may_differ():
    shape = PipelineShape(2, 2, 2)
    found = replay(lower(forward_only(shape), shape), shape, Costs(forward=[1, 2, 3, 4]))
    assert [span.end - span.start for span in found.spans[1]] == [2, 2, 4, 4]


def test_a_plan_that_cannot_go_on_is_an_error_that_names_the_ranks():
    shape = PipelineShape(2, 1, 1)
    with pytest.raises(ScheduleError, match="pp_rank 1 at 1F0"):
        replay(parse("0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"), shape)
