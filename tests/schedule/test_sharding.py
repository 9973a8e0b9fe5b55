"""Full sharding in plans: gathered where it runs, never more than allowed, as seldom as can be, and proved so."""

from functools import cache
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import shapes, text

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.schedule import Action, Op, PipelineShape, ScheduleError, breadth_first, check, forward_only, lower
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.schedule.ir import COMPUTE
from megatron_bfpp.schedule.replay import replay
from megatron_bfpp.schedule.sharding import ParameterBytes, count_gathers, peak_parameter_bytes


def test_the_plan_of_2_ranks_3_chunks_2_microbatches_2_resident_written_out():
    shape = PipelineShape(2, 3, 2)
    rank_0, _ = text(lower(breadth_first(shape), shape, resident_chunks=2))
    assert rank_0 == (
        "0UNSHARD 0F0 0SEND_F0 2RECV_F0 2UNSHARD 0F1 0SEND_F1 2RECV_F1 0RESHARD 4UNSHARD 2F0 2SEND_F0 4RECV_F0 2F1 "
        "2SEND_F1 4RECV_F1 4F0 4SEND_F0 4RECV_B0 4F1 4SEND_F1 4RECV_B1 4B0 4SEND_B0 2RECV_B0 4B1 4SEND_B1 "
        "4REDUCE_GRAD 2RECV_B1 4RESHARD 0UNSHARD 2B0 2SEND_B0 0RECV_B0 2B1 2SEND_B1 2REDUCE_GRAD 0RECV_B1 2RESHARD "
        "0B0 0B1 0REDUCE_GRAD 0RESHARD"
    )


def test_an_evaluation_gathers_each_chunk_once():
    shape = PipelineShape(2, 2, 2)
    assert text(lower(forward_only(shape), shape, resident_chunks=2)) == [
        "0UNSHARD 0F0 0SEND_F0 2RECV_F0 2UNSHARD 0F1 0SEND_F1 2RECV_F1 0RESHARD 2F0 2SEND_F0 2F1 2SEND_F1 2RESHARD",
        "1UNSHARD 1RECV_F0 1RECV_F1 1F0 1SEND_F0 3RECV_F0 3UNSHARD 1F1 1SEND_F1 3RECV_F1 1RESHARD 3F0 3F1 3RESHARD",
    ]


@given(shapes, st.data(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_gathers_do_not_depend_on_the_number_of_microbatches(shape, data, eager):
    resident = data.draw(st.integers(1, shape.num_chunks))
    plan = lower(breadth_first(shape, eager_backward=eager), shape, resident_chunks=resident)
    check(plan, shape, resident_chunks=resident)
    for rank, actions in enumerate(plan):
        assert count_gathers(actions) == 2 * shape.num_chunks - resident
        assert sum(action.op is Op.REDUCE_GRAD for action in actions) == shape.num_chunks
        # Between forward and backward the last chunks stay.
        kept = list(shape.stages_on(rank))[shape.num_chunks - resident :]
        assert all(actions.count(Action(stage, Op.UNSHARD)) == 1 for stage in kept)


@given(st.builds(PipelineShape, st.integers(2, 4), st.integers(1, 4), st.integers(1, 8)), st.data(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_with_groups_too_no_plan_has_fewer_gathers(shape, data, eager):
    group, resident = data.draw(st.integers(1, shape.num_microbatches)), data.draw(st.integers(1, shape.num_chunks))
    plan = lower(breadth_first(shape, group, eager), shape, resident_chunks=resident)
    check(plan, shape, resident_chunks=resident)
    for actions in plan:
        runs = [stage for stage, _ in groupby(action.stage for action in actions if action.op in COMPUTE)]
        assert count_gathers(actions) == fewest_gathers(runs, resident)


def fewest_gathers(runs, places):
    """Try every choice of the chunk to free."""
    states = {frozenset(): 0}
    for stage in runs:
        after = {}
        for held, gathers in states.items():
            if stage in held:
                choices = [(held, gathers)]
            elif len(held) < places:
                choices = [(held | {stage}, gathers + 1)]
            else:
                choices = [(held - {other} | {stage}, gathers + 1) for other in held]
            for found, count in choices:
                after[found] = min(count, after.get(found, count))
        states = after
    return min(states.values())


@given(shapes, st.booleans())
@settings(deadline=None, max_examples=60)
def test_with_2_places_a_gather_is_launched_a_whole_chunk_ahead_and_the_second_behind_the_first_forward(shape, eager):
    for actions in lower(breadth_first(shape, eager_backward=eager), shape, resident_chunks=min(2, shape.num_chunks)):
        computes = [action for action in actions if action.op in COMPUTE]
        for position, action in enumerate(actions):
            ahead = [other.stage for other in actions[position:] if other.op in COMPUTE]
            if action.op is Op.UNSHARD and position > 0:
                is_second = len(computes) - len(ahead) < 2 and action.stage == computes[0].stage + shape.pp_size
                late = 1 if is_second and shape.num_microbatches > 1 else 0
                assert ahead.index(action.stage) >= shape.num_microbatches - late
                assert not late or len(ahead) == len(computes) - 1


@cache
def sound_plan(size, chunks, microbatches, group, resident):
    shape = PipelineShape(size, chunks, microbatches)
    return shape, lower(breadth_first(shape, group), shape, resident_chunks=resident)


@st.composite
def damaged_plans(draw):
    microbatches, chunks = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    resident = draw(st.integers(1, chunks))
    shape, sound = sound_plan(2, chunks, microbatches, draw(st.integers(1, microbatches)), resident)
    plan = [list(actions) for actions in sound]
    actions = plan[draw(st.integers(0, 1))]
    changes = [index for index, action in enumerate(actions) if action.op in (Op.UNSHARD, Op.RESHARD)]
    one, two = draw(st.sampled_from(changes)), draw(st.integers(0, len(actions) - 1))
    kind = draw(st.sampled_from(("drop", "double", "move", "stage", "kind", "one less")))
    if kind == "drop":
        del actions[one]
    elif kind == "double":
        actions.insert(two, actions[one])
    elif kind == "move":
        actions.insert(two, actions.pop(one))
    elif kind == "stage":
        stage = draw(st.sampled_from([action.stage for action in actions]))
        actions[one] = actions[one]._replace(stage=stage)
    elif kind == "kind":
        actions[one] = actions[one]._replace(op=Op.RESHARD if actions[one].op is Op.UNSHARD else Op.UNSHARD)
    else:
        resident -= 1
    return kind, shape, plan, resident


def is_legal(plan, resident):
    """Judge by the rules, from the history of every stage up to every step; shares no code with the checker."""
    for actions in plan:
        for step in range(len(actions)):
            history = {}
            for stage, op, _ in actions[: step + 1]:
                history.setdefault(stage, []).append(op)
            held = 0
            for ops in history.values():
                words = "".join({Op.UNSHARD: "u", Op.RESHARD: "r"}.get(op, "c" if op in COMPUTE else "") for op in ops)
                pieces = words.split("r")
                if any(not piece.startswith("u") or "u" in piece[1:] or len(piece) == 1 for piece in pieces[:-1]):
                    return False
                if pieces[-1] and (pieces[-1][0] != "u" or "u" in pieces[-1][1:]):
                    return False
                held += pieces[-1] != ""
            if held > resident or (step == len(actions) - 1 and held):
                return False
    return True


verdicts = set()


@given(damaged_plans())
@settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck), database=None)
def rejects_exactly_what_is_not_legal(damaged):
    kind, shape, plan, resident = damaged
    try:
        check(plan, shape, resident_chunks=resident)
        verdict = ""
    except ScheduleError as error:
        verdict = str(error)
        assert verdict.startswith("pp_rank ") and ("SHARD" in verdict or "gathered" in verdict), verdict
    assert (verdict == "") == is_legal(plan, resident), f"{kind}: {verdict or 'accepted'}\n" + "\n".join(text(plan))
    verdicts.add((kind, verdict == ""))


def test_damaged_plans_are_rejected_exactly_when_a_chunk_is_not_gathered_or_too_many_are():
    verdicts.clear()
    rejects_exactly_what_is_not_legal()
    assert {(kind, False) for kind in ("drop", "double", "move", "stage", "kind", "one less")} <= verdicts
    assert ("move", True) in verdicts and ("drop", True) not in verdicts


def test_a_plan_that_gives_chunks_up_is_checked_as_sharded_without_being_told():
    shape = PipelineShape(2, 3, 2)
    plan = lower(breadth_first(shape), shape, resident_chunks=2)
    check(plan, shape)
    last = max(index for index, action in enumerate(plan[0]) if action == Action(0, Op.UNSHARD))
    del plan[0][last]
    with pytest.raises(ScheduleError, match=r"pp_rank 0: .* 0B0 runs while its parameters are sharded"):
        check(plan, shape)


def test_the_reduction_of_a_sharded_chunk_may_not_be_missing():
    shape = PipelineShape(2, 2, 2)
    plan = lower(breadth_first(shape), shape, resident_chunks=2)
    plan[1].remove(Action(3, Op.REDUCE_GRAD))
    with pytest.raises(ScheduleError, match="3REDUCE_GRAD is missing"):
        check(plan, shape, resident_chunks=2)


def test_no_chunk_could_run_without_a_place():
    shape = PipelineShape(2, 2, 2)
    with pytest.raises(UserError, match="resident_chunks is 0"):
        lower(breadth_first(shape), shape, resident_chunks=0)


def test_a_backward_waits_for_its_gather_too_and_gathers_hide_behind_the_chunk_before():
    shape = PipelineShape(2, 4, 8)
    plans = {n: lower(breadth_first(shape), shape, resident_chunks=n) for n in (1, 2)}
    alone = replay(plans[2], shape).step_time
    # The first gather cannot hide, the others do, as long as they are shorter than a chunk's 8 forwards.
    assert replay(plans[2], shape, Costs(gather=4)).step_time == alone + 4
    # With 1 place every gather is exposed, those before backwards as well.
    assert replay(plans[1], shape, Costs(gather=4)).step_time >= alone + 4 * 7
    late = replay(plans[2], shape, Costs(forward=100, backward=1, gather=50)).step_time
    assert late > replay(plans[2], shape, Costs(forward=100, backward=1)).step_time + 50


def test_the_peak_is_the_shards_and_two_chunks_of_parameters_and_gradients():
    shape = PipelineShape(2, 4, 4)
    (actions, _) = lower(breadth_first(shape), shape, resident_chunks=2)
    chunk, replicas = 1000, 4
    peak = peak_parameter_bytes(actions, shape, [chunk] * 4, replicas, ParameterBytes())
    # At the end of chunk 1's backwards: 1 and 0 are gathered, 2 and 1 are being reduced, into shards like 3.
    assert peak == 12 * 4 * chunk / replicas + 2 * (4 + 4) * chunk + 3 * 4 * chunk / replicas
    evaluation, _ = lower(forward_only(shape), shape, resident_chunks=2)
    assert (
        peak_parameter_bytes(evaluation, shape, [chunk] * 4, replicas, ParameterBytes()) == 12 * chunk + 2 * 4 * chunk
    )
