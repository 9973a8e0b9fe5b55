"""The checker rejects exactly the damage that changes what a plan computes."""

import re
from collections import Counter
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import meaning
from shapes import parse

from megatron_bfpp.schedule import Action, Op, PipelineShape, ScheduleError, breadth_first, check, formats, lower
from megatron_bfpp.schedule.ir import CHUNK_OPS, RECEIVES

NAMES_AN_ACTION = re.compile(r"\b\d+((F|B|SEND_F|RECV_F|SEND_B|RECV_B)\d+|UNSHARD|REDUCE_GRAD)\b")


@cache
def sound_plan(size, chunks, microbatches, eager):
    shape = PipelineShape(size, chunks, microbatches)
    plan = lower(breadth_first(shape, eager_backward=eager), shape)
    return shape, plan, meaning(plan, shape)


KINDS = ("drop", "double", "swap", "swap neighbours", "swap receives", "move receive", "move", "microbatch", "ranks")


@st.composite
def damaged_plans(draw):
    sizes = draw(st.tuples(st.integers(2, 5), st.integers(1, 3), st.integers(1, 6), st.booleans()))
    shape, sound, wanted = sound_plan(*sizes)
    plan = [list(actions) for actions in sound]
    kind = draw(st.sampled_from(KINDS))
    rank = draw(st.integers(0, shape.pp_size - 1))
    actions = plan[rank]
    receives = [index for index, action in enumerate(actions) if action.op in RECEIVES] or [0]
    anywhere = st.integers(0, len(actions) - 1)
    one = draw(st.sampled_from(receives) if "receive" in kind else anywhere)
    two = draw(st.sampled_from(receives) if kind == "swap receives" else anywhere)
    if kind == "drop":
        del actions[one]
    elif kind == "double":
        actions.insert(two, actions[one])
    elif kind == "ranks":
        other = (rank + 1) % shape.pp_size
        plan[rank], plan[other] = plan[other], plan[rank]
    elif kind in ("move", "move receive"):
        actions.insert(two, actions.pop(one))
    elif kind == "microbatch":
        other = draw(st.integers(0, shape.num_microbatches))
        if actions[one].op not in CHUNK_OPS:
            actions[one] = actions[one]._replace(microbatch=other)
    else:
        two = (one + 1) % len(actions) if kind == "swap neighbours" else two
        actions[one], actions[two] = actions[two], actions[one]
    return kind, shape, plan, wanted


verdicts: Counter = Counter()


@given(damaged_plans())
@settings(deadline=None, max_examples=3000, suppress_health_check=list(HealthCheck), database=None)
def rejects_exactly_what_changes_the_meaning(damaged):
    kind, shape, plan, wanted = damaged
    try:
        check(plan, shape, one_queue=False, device_waits=False)  # the oracle's transport
        verdict = ""
    except ScheduleError as error:
        verdict = str(error)
    found = meaning(plan, shape)
    assert (verdict == "") == (found == wanted), f"{kind}: {verdict or 'accepted'}\n{formats.to_text(plan)}"
    if verdict:
        assert re.search(r"pp_rank \d", verdict) and NAMES_AN_ACTION.search(verdict), verdict
    verdicts[kind, "accepted" if verdict == "" else "rejected"] += 1


@pytest.mark.slow
def test_damaged_plans_are_rejected_exactly_when_their_meaning_changes():
    verdicts.clear()
    rejects_exactly_what_changes_the_meaning()
    for kind in KINDS:
        assert verdicts[kind, "rejected"] > 20, verdicts
    # A dropped, doubled or exchanged part always changes the meaning; a move often does not.
    for kind in ("drop", "double", "ranks"):
        assert verdicts[kind, "accepted"] == 0, verdicts
    for kind in ("swap", "swap neighbours", "swap receives", "move", "move receive"):
        assert verdicts[kind, "accepted"] > 10, verdicts


@pytest.mark.parametrize("op", [Op.REDUCE_GRAD, Op.UNSHARD])
def test_a_chunk_op_stands_for_all_stages_or_for_none(op):
    shape = PipelineShape(2, 2, 2)
    plan = lower(breadth_first(shape), shape)
    check([[action for action in actions if action.op is not op] for actions in plan], shape)
    plan[1].remove(Action(3, op))
    with pytest.raises(ScheduleError, match=f"pp_rank 1: 3{op} is missing"):
        check(plan, shape)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_plan_that_only_a_buffering_transport_survives_is_rejected_with_every_blocked_rank(size):
    shape = PipelineShape(size, 2, 3)
    order = []
    for rank in range(size):
        first, second = shape.stages_on(rank)
        alternate = " ".join(f"{second}F{mb} {second}B{mb}" for mb in range(3))
        order += parse(f"{first}F0 {first}F1 {first}F2 {alternate} {first}B0 {first}B1 {first}B2")
    plan = lower(order, shape)
    check(plan, shape)
    late = [Action(size, Op.RECV_F, 1), Action(size, Op.RECV_F, 2)]
    actions = [action for action in plan[0] if action not in late]
    at = actions.index(Action(size, Op.F, 1))
    plan[0] = actions[:at] + late + actions[at:]
    # The last rank may not run its second chunk before rank 0 has received its outputs of the first. Rank 0 receives
    # them only after its first backward, and that needs the last rank's.
    with pytest.raises(ScheduleError) as error:
        check(plan, shape)
    message = str(error.value)
    assert message.count("\n") == size
    assert re.search(rf"pp_rank 0: step \d+ {size}B0 waits for SEND_B of pp_rank 1", message)
    last = f"pp_rank {size - 1}: step \\d+ {2 * size - 1}F0 waits for the receive of its SEND_F by pp_rank 0"
    assert re.search(last, message)
    assert meaning(plan, shape) == "hangs"
    assert meaning(plan, shape, buffered=True) == meaning(lower(order, shape), shape)


def test_orders_that_wait_in_a_circle_are_rejected_with_every_rank():
    shape = PipelineShape(2, 2, 2)
    order = parse("0F0 2F0 0F1 2F1 2B0 2B1 0B0 0B1", "3F0 1F0 1F1 3F1 3B0 3B1 1B0 1B1")
    with pytest.raises(ScheduleError) as error:
        lower(order, shape)
    assert "pp_rank 0: step 1 2F0 waits for 1F0 of pp_rank 1" in str(error.value)
    assert "pp_rank 1: step 0 3F0 waits for 2F0 of pp_rank 0" in str(error.value)
