"""The simulator: times worked out by hand, and where a message between ranks costs time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import parse, shapes

from megatron_bfpp.schedule import PipelineShape, ScheduleError, breadth_first, interleaved_1f1b, lower, simulate


def times(timeline):
    return [[(str(span.action), span.start, span.end) for span in spans] for spans in timeline.spans]


def test_a_step_of_2_ranks_worked_out_by_hand():
    timeline = simulate(parse("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"), PipelineShape(2, 1, 2), 1, 2, hop=0.5)
    assert times(timeline) == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 5, 7), ("0B1", 8, 10)],
        [("1F0", 1.5, 2.5), ("1B0", 2.5, 4.5), ("1F1", 4.5, 5.5), ("1B1", 5.5, 7.5)],
    ]
    assert timeline.step_time == 10
    assert timeline.bubble_fraction == pytest.approx(1 - 12 / 20)
    assert timeline.peak_live_activations() == [2, 1]


@given(shapes, st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_plan_takes_the_time_of_its_order(shape, eager):
    order = breadth_first(shape, eager_backward=eager)
    assert simulate(lower(order, shape), shape) == simulate(order, shape)


@given(shapes)
@settings(deadline=None)
def test_the_bubble_is_what_the_exact_step_time_leaves(shape):
    size, chunks, microbatches = shape.pp_size, shape.num_chunks, shape.num_microbatches
    exact = (chunks - 1) * max(microbatches, size) + microbatches + size - 1
    assert simulate(breadth_first(shape), shape).bubble_fraction == pytest.approx(1 - chunks * microbatches / exact)


def test_more_microbatches_hide_the_hops_of_breadth_first_and_not_those_of_1f1b():
    # The loop from the last rank to the first is hidden iff M >= P (1 + c/tf): here 4 (1 + 1) = 8.
    for microbatches, is_hidden in ((4, False), (8, True), (16, True)):
        shape = PipelineShape(4, 4, microbatches)
        late = breadth_first(shape, eager_backward=False)
        ideal = simulate(late, shape, 1, 1).step_time
        ends = 2 * (shape.pp_size - 1)  # hops on the way in and out, which nothing can hide
        assert (simulate(late, shape, 1, 1, hop=1).step_time == ideal + ends) == is_hidden
    assert simulate(interleaved_1f1b(shape), shape, 1, 1, hop=1).step_time > ideal + ends


def test_orders_that_wait_for_each_other_are_rejected_with_every_rank():
    with pytest.raises(ScheduleError) as error:
        simulate(parse("2F0 0F0", "1F0 3F0"), PipelineShape(2, 2, 1))
    assert "pp_rank 0: step 0 2F0 waits for 1F0 of pp_rank 1" in str(error.value)
    assert "pp_rank 1: step 0 1F0 waits for 0F0 of pp_rank 0" in str(error.value)
