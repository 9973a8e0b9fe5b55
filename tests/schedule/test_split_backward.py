"""A backward in two: its order, its bubble to the last unit, its peaks, and the lags that are chosen."""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import meaning
from shapes import shapes, text

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.schedule import Action, Op, PipelineShape, breadth_first, lower, simulate
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.schedule.lower import aligned
from megatron_bfpp.schedule.orders import split_backward, weight_lags
from megatron_bfpp.schedule.plan import choose_weight_lags, plan_of
from megatron_bfpp.schedule.replay import replay
from megatron_bfpp.schedule.sharding import ParameterBytes, peak_parameter_bytes


def split(shape, lags=None, eager=True):
    return breadth_first(shape, None, eager, weight_lags(shape) if lags is None else lags)


def bubble(shape, eager=True):
    """Step time beyond the ideal, in units of f = i = w."""
    time = simulate(split(shape, eager=eager), shape, 1, 2).step_time
    return int(time) - 3 * shape.num_chunks * shape.num_microbatches


def test_the_order_of_2_ranks_2_chunks_2_microbatches_written_out():
    shape = PipelineShape(2, 2, 2)
    assert text(split(shape)) == [
        "0F0 0F1 2F0 2F1 2I0 2W0 2I1 2W1 0I0 0W0 0I1 0W1",
        "1F0 1F1 3F0 3I0 3F1 3I1 3W0 1I0 3W1 1I1 1W0 1W1",
    ]


@given(shapes, st.data(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_each_backward_is_replaced_in_its_place_and_the_weights_follow_in_order_by_at_most_the_lag(shape, data, eager):
    group = data.draw(st.none() | st.integers(1, shape.num_microbatches))
    lags = data.draw(st.lists(st.integers(0, 20), min_size=shape.pp_size, max_size=shape.pp_size))
    whole = breadth_first(shape, group, eager)
    for rank, (actions, plain) in enumerate(zip(split_backward(whole, lags), whole, strict=True)):
        inputs = [each._replace(op=Op.B) if each.op is Op.I else each for each in actions if each.op is not Op.W]
        assert inputs == plain
        weights = [each._replace(op=Op.B) for each in actions if each.op is Op.W]
        assert weights == [each for each in plain if each.op is Op.B]
        owed = ran = 0
        for action in actions:
            ran += action.op is Op.I
            owed += {Op.I: 1, Op.W: -1}.get(action.op, 0)
            # Beside the one that has just run its I; behind the last I all that is owed follows.
            assert owed <= lags[rank] + (action.op is Op.I)
            assert owed >= min(lags[rank], ran) or ran == len(weights)


@given(st.builds(PipelineShape, st.integers(2, 5), st.integers(1, 3), st.integers(1, 6)), st.data(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_split_plan_computes_what_the_whole_one_computes(shape, data, eager):
    group, resident = data.draw(st.integers(1, shape.num_microbatches)), data.draw(st.integers(1, shape.num_chunks))
    lags = data.draw(st.lists(st.integers(0, 20), min_size=shape.pp_size, max_size=shape.pp_size))
    whole, two = breadth_first(shape, group, eager), breadth_first(shape, group, eager, lags)
    for places in (None, resident):
        wanted, found = (meaning(lower(order, shape, places), shape, resident=places) for order in (whole, two))
        assert not isinstance(wanted, str) and found == wanted


def test_the_bubble_is_p_minus_1_over_3_m_v_for_every_shape():
    compared = 0
    for size, chunks in product(range(2, 9), range(2, 5)):
        for microbatches in range(size, 4 * size + 1):
            shape = PipelineShape(size, chunks, microbatches)
            ideal = 3 * chunks * microbatches
            assert Fraction(bubble(shape), ideal) == Fraction(size - 1, 3 * microbatches * chunks), shape
            compared += 1
    assert compared == 336


def test_the_bubble_with_fewer_microbatches_than_ranks_and_with_one_chunk():
    """The chunks lose P - M each, those but one P - 2M more where not even two waves fill the pipeline."""
    for size, chunks in product(range(2, 11), range(1, 5)):
        for microbatches in range(1, 2 * size + 2):
            missing, missing_twice = max(0, size - microbatches), max(0, size - 2 * microbatches)
            wanted = size - 1 + chunks * missing + (chunks - 1) * missing_twice
            assert bubble(PipelineShape(size, chunks, microbatches)) == wanted, (size, chunks, microbatches)
    assert bubble(PipelineShape(8, 4, 4)) / (3 * 4 * 4) == pytest.approx(0.479, abs=1e-3)


def test_late_backwards_leave_twice_the_bubble():
    for size, chunks, times in product(range(2, 9), range(2, 5), (1, 2, 4)):
        assert bubble(PipelineShape(size, chunks, times * size), eager=False) == 2 * (size - 1)


@pytest.mark.parametrize("eager", [True, False])
def test_the_peak_of_live_activations_is_that_of_the_plain_order(eager):
    hops, times = (0.0, 0.25, 1.0, 3.0), ((1.0, 1.0), (2.0, 1.0), (1.0, 0.25), (1.0, 2.0))
    for sizes in product(range(2, 9), range(1, 5), (1, 2, 3, 5, 8, 13, 24)):
        shape = PipelineShape(*sizes)
        plain = simulate(breadth_first(shape, None, eager), shape).peak_live_activations()
        for lags in {tuple(weight_lags(shape, None, hop, *each)) for hop, each in product(hops, times)}:
            found = simulate(split(shape, lags, eager), shape)
            assert max(found.peak_live_activations()) == max(plain), (sizes, lags)
            owed = found.peak_owed_weight_gradients()
            total = shape.num_chunks * shape.num_microbatches
            assert owed == [min(lag + 1, total) for lag in lags]


def test_groups_that_fill_the_pipeline_keep_the_bubble_and_the_peak_and_smaller_ones_raise_the_peak_a_little():
    for size, chunks, microbatches in product((2, 4, 5, 8), (1, 2, 4), (8, 12, 16)):
        shape = PipelineShape(size, chunks, microbatches)
        for group in range(1, microbatches + 1):
            found = simulate(breadth_first(shape, group, True, weight_lags(shape)), shape)
            plain = simulate(breadth_first(shape, group), shape)
            more = max(found.peak_live_activations()) - max(plain.peak_live_activations())
            assert more <= max(0, size - 1 - group), (shape, group)
            assert found.step_time < plain.step_time, (shape, group)
            if group >= size:
                assert found.step_time == 3 * chunks * microbatches + size - 1, (shape, group)


def test_a_longer_lag_than_twice_the_rank_would_raise_the_peak():
    shape = PipelineShape(4, 2, 8)
    plain = max(simulate(breadth_first(shape), shape).peak_live_activations())
    assert max(simulate(split(shape, [3 * rank for rank in range(4)]), shape).peak_live_activations()) > plain


def test_the_lags_of_the_formula_and_of_the_dial():
    shape = PipelineShape(4, 2, 8)
    assert weight_lags(shape) == [0, 1, 2, 3]
    assert weight_lags(shape, hop=0.25) == [0, 2, 3, 4]
    assert weight_lags(shape, inputs=2.0, weights=0.5) == [0, 2, 4, 6]  # twice the rank, not four times
    assert weight_lags(shape, inputs=0.5) == weight_lags(shape, weights=0.0) == [0, 1, 2, 3]
    assert weight_lags(shape, most=2) == [0, 1, 2, 2] and weight_lags(shape, most=0) == [0] * 4
    assert weight_lags(PipelineShape(4, 1, 2)) == [0, 1, 2, 2]  # no more than there are
    with pytest.raises(UserError, match="the weight lag is -1; at least 0"):
        weight_lags(shape, -1)


@pytest.mark.parametrize("lags", [[0, 1], [0, 1, 2, -1], [0] * 5])
def test_a_lag_below_0_or_for_other_ranks_is_refused_with_its_numbers(lags):
    with pytest.raises(UserError, match=rf"the weight lag is \[{', '.join(map(str, lags))}\].* 0 or more .* 4 ranks"):
        split(PipelineShape(4, 2, 8), lags)


def test_the_chosen_lags_are_never_worse_than_the_rank_and_better_where_a_hop_can_be_covered():
    better = set()
    for size, chunks, times, eager in product((2, 4, 8), (1, 2, 4), (0.5, 1, 2), (True, False)):
        shape = PipelineShape(size, chunks, int(times * size))
        for hop, (inputs, weights) in product((0.0, 0.1, 0.25, 0.5, 1.0), ((1.0, 1.0), (2.0, 1.0), (0.75, 1.25))):
            lags = choose_weight_lags(shape, None, eager, hop=hop, inputs=inputs, weights=weights)
            chosen, simple = (
                simulate(split(shape, each, eager), shape, 1.0, inputs + weights, hop, weights).step_time
                for each in (lags, weight_lags(shape))
            )
            assert chosen <= simple + 1e-9, (shape, hop, lags)
            if chosen < simple - 1e-9:
                better.add((times, hop))
            elif inputs <= weights and hop == 0:
                assert lags == tuple(weight_lags(shape))
    assert {(2, 0.1), (2, 0.5), (2, 1.0)} <= better


def test_the_chosen_lags_keep_to_the_dial_and_of_equal_steps_owe_least():
    shape = PipelineShape(8, 4, 16)
    assert choose_weight_lags(shape, None, True, hop=0.5) == (0, 2, 3, 5, 6, 8, 9, 11)
    assert choose_weight_lags(shape, None, True, hop=0.5, most=4) == (0, 1, 2, 3, 4, 4, 4, 4)
    # The hops of 8 micro-batches on 8 ranks stand in every rank's way: the longer lags lose.
    assert choose_weight_lags(PipelineShape(8, 4, 8), None, True, hop=0.5) == tuple(range(8))
    # One micro-batch leaves nothing to choose between.
    assert choose_weight_lags(PipelineShape(4, 1, 1), None, True, hop=1.0) == (0, 1, 1, 1)


def test_a_plan_says_what_its_ranks_owe_and_an_evaluation_owes_nothing():
    shape = PipelineShape(4, 2, 8)
    plan = plan_of(shape, None, True, False, None, 0.25, (0, 1, 2, 3))
    assert plan.peak_owed_weight_gradients == [1, 2, 3, 4]
    assert plan.bubble_fraction == pytest.approx(3 / (3 * 16 + 3))
    assert max(plan.peak_live_activations) == max(plan_of(shape, None, True, False).peak_live_activations)
    evaluation = plan_of(shape, None, True, True, None, 0.25, (0, 1, 2, 3))
    assert evaluation.digest == plan_of(shape, None, True, True).digest
    assert evaluation.peak_owed_weight_gradients == [0] * 4


REAL_TIMES = ((2.0, 1.0), (2.0, 0.8), (2.0, 1.2), (3.0, 1.0), (2.6, 0.9))  # backward, weights; a forward takes 1


@pytest.mark.parametrize("sizes", [(8, 4, 8), (8, 4, 16), (4, 4, 4), (4, 2, 16), (6, 3, 9)])
def test_receives_stand_where_messages_cost_nothing_and_little_on_one_queue(sizes):
    shape = PipelineShape(*sizes)
    order = split(shape)
    for hop, (backward, weights) in product((0.0, 0.1, 0.25), REAL_TIMES):
        bound = simulate(order, shape, 1.0, backward, hop, weights).step_time
        costs = Costs(1.0, backward, weights, hop=hop)
        own, one = (replay(lower(order, shape), shape, costs, connections=each).step_time for each in (32, 1))
        assert own == pytest.approx(bound, rel=1e-9), (hop, backward, weights)
        assert one <= 1.01 * bound, (hop, backward, weights)


@pytest.mark.parametrize("sizes, lost", [((8, 4, 8), 1), ((8, 2, 8), 1), ((8, 4, 16), 0), ((4, 4, 4), 0)])
def test_on_one_queue_receives_for_a_hop_cost_a_unit_where_8_micro_batches_on_8_ranks_have_none(sizes, lost):
    """A hop leaves idle time between a forward and the backward behind it; the receives of two forwards stand before
    it, and without a hop the second waits for a forward that has just begun."""
    shape = PipelineShape(*sizes)
    order = split(shape)
    bound = simulate(order, shape).step_time
    assert replay(lower(order, shape), shape, connections=1).step_time == bound + lost
    assert replay(lower(order, shape, hop=0.0), shape, connections=1).step_time == bound


def overheads(order, shape, resident=None):
    """Step time beyond the ideal, in percent, with reductions of 0, 1/8, 1/4, 1/2 and 1 times the backwards of a chunk.

    They have 4 buckets: of all chunks if sharded, else of the first rank's first chunk, as Megatron's DDP has them.
    """
    plan, ideal = lower(order, shape, resident), 3 * shape.num_chunks * shape.num_microbatches
    reductions = (part * 2 * shape.num_microbatches for part in (0, 0.125, 0.25, 0.5, 1))
    times = (replay(plan, shape, Costs(reduction=each, buckets=4)).step_time for each in reductions)
    return [round(100 * (time / ideal - 1), 1) for time in times]


def test_reductions_cost_what_the_arithmetic_says():
    shape = PipelineShape(8, 4, 8)
    whole, two = breadth_first(shape), split(shape)
    # All ranks end together where backwards are split: the last reduction of each is exposed, without its buckets.
    assert overheads(whole, shape) == [21.9, 22.4, 24.5, 28.6, 38.5]
    assert overheads(two, shape) == [7.3, 9.4, 11.5, 15.6, 31.2]
    # Fully sharded, a B launches it part by part; a W does not, the executor launches it behind the last one.
    assert overheads(whole, shape, 4) == overheads(whole, shape, 2) == [21.9, 22.4, 24.5, 28.6, 37.0]
    assert overheads(two, shape, 4) == overheads(two, shape, 2) == [7.3, 9.4, 11.5, 15.6, 31.2]


def test_a_sharded_rank_waits_for_the_reduction_before_where_it_launches_the_next():
    shape = PipelineShape(2, 3, 4)
    plan = lower(split(shape), shape, 2)
    found = replay(plan, shape, Costs(reduction=20))  # of 8 units of a chunk's backwards
    for rank in range(2):
        reductions = [each for action, each in found.collectives[rank] if action.op is Op.REDUCE_GRAD]
        assert len(reductions) == 3
        for one, two, three in zip(reductions, reductions[1:], reductions[2:]):
            # Not launched before the first was over: its gradients would have stayed beside two more chunks'.
            assert one.end <= three.launched and two.end <= three.end


@given(st.builds(PipelineShape, st.integers(2, 5), st.integers(1, 3), st.integers(1, 6)), st.data())
@settings(deadline=None, max_examples=40)
def test_a_reduction_runs_after_the_last_weights_and_a_step_never_takes_longer_than_with_whole_backwards(shape, data):
    part, resident = data.draw(st.sampled_from([0, 0.5, 1])), data.draw(st.none() | st.integers(1, shape.num_chunks))
    buckets = data.draw(st.sampled_from([1, 3]))
    costs = Costs(reduction=part * 2 * shape.num_microbatches, buckets=buckets)  # at most a chunk's backwards
    found = replay(lower(split(shape), shape, resident), shape, costs)
    for rank, log in enumerate(found.collectives):
        spans = {span.action: span for span in found.spans[rank]}
        for action, collective in log:
            if action.op is Op.REDUCE_GRAD:
                last = spans[Action(action.stage, Op.W, shape.num_microbatches - 1)]
                is_in_it = buckets > 1 and resident is None and action.stage == 0
                assert collective.launched >= (last.start if is_in_it else last.end)
    if resident is None or buckets == 1:  # a sharded B launches its parts one by one, a W does not
        whole = replay(lower(breadth_first(shape), shape, resident), shape, costs)
        assert found.step_time <= whole.step_time + 1e-9


@pytest.mark.parametrize("resident", [1, 2, 4])
def test_a_sharded_rank_holds_no_more_parameters_and_gradients_than_with_whole_backwards(resident):
    shape = PipelineShape(4, 4, 8)
    plans = [lower(order, shape, resident) for order in (breadth_first(shape), split(shape))]
    for whole, two in zip(*plans, strict=True):
        sizes = [1000] * shape.num_chunks, 4, ParameterBytes()
        assert peak_parameter_bytes(two, shape, *sizes) <= peak_parameter_bytes(whole, shape, *sizes)


def test_the_reductions_of_a_split_plan_move_too_where_they_are_aligned():
    shape = PipelineShape(4, 2, 8)
    plan = lower(split(shape), shape)
    found = aligned(plan, shape)
    assert [sorted(actions) for actions in found] == [sorted(actions) for actions in plan]
    for rank, actions in enumerate(found):
        weights = [each for each in actions if each.op is Op.W]
        for stage in shape.stages_on(rank):
            before = actions[: actions.index(Action(stage, Op.REDUCE_GRAD))]
            wanted = min(weights.index(Action(stage, Op.W, 7)) + 1 + rank, len(weights))
            assert sum(each.op is Op.W for each in before) == wanted
