"""Plans: the checker accepts what the orders make and rejects what is damaged, naming ranks and actions."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bfpp.schedule import (
    Action,
    Op,
    PipelineShape,
    ScheduleError,
    breadth_first,
    check,
    formats,
    forward_only,
    interleaved_1f1b,
    lower,
)
from megatron_bfpp.schedule.ir import COMPUTE, RECEIVES, SENDS
from megatron_bfpp.schedule.lower import channel, peer

shapes = st.builds(PipelineShape, st.integers(2, 8), st.integers(1, 4), st.integers(1, 17))


def parse(*rows: str):
    return formats.from_text("\n".join(rows))


def test_the_plan_of_2_ranks_1_chunk_2_microbatches_written_out():
    shape = PipelineShape(2, 1, 2)
    assert formats.to_text(lower(breadth_first(shape, eager_backward=False), shape)).splitlines() == [
        "0UNSHARD 0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1 0REDUCE_GRAD",
        "1UNSHARD 1RECV_F0 1RECV_F1 1F0 1F1 1B0 1SEND_B0 1B1 1SEND_B1 1REDUCE_GRAD",
    ]


@given(shapes, st.data(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_every_plan_of_breadth_first_is_accepted(shape, data, eager):
    group = data.draw(st.none() | st.integers(1, shape.num_microbatches))
    check(lower(breadth_first(shape, group, eager), shape), shape)


@given(shapes)
@settings(deadline=None, max_examples=50)
def test_every_plan_of_an_evaluation_is_accepted(shape):
    check(lower(forward_only(shape), shape), shape, forward_only=True)


def test_every_plan_of_interleaved_1f1b_is_accepted():
    for size in range(2, 7):
        for microbatches in range(size, 4 * size + 1, size):
            shape = PipelineShape(size, 3, microbatches)
            check(lower(interleaved_1f1b(shape), shape), shape)


@given(shapes, st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_receive_is_posted_before_the_action_ahead_of_its_use(shape, eager):
    # One action ahead of need at the latest, so that a message can arrive while the rank computes.
    for actions in lower(breadth_first(shape, eager_backward=eager), shape):
        computes = [action for action in actions if action.op in COMPUTE]
        for position, action in enumerate(actions):
            if action.op in RECEIVES:
                user = Action(action.stage, Op.F if action.op is Op.RECV_F else Op.B, action.microbatch)
                before = sum(other.op in COMPUTE for other in actions[:position])
                assert before <= max(0, computes.index(user) - 1)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_each_chunk_is_gathered_once_ahead_of_its_use_and_reduced_once_right_after_its_last_backward(shape):
    for rank, actions in enumerate(lower(breadth_first(shape), shape)):
        for stage in shape.stages_on(rank):
            gather, reduce = (actions.index(Action(stage, op)) for op in (Op.UNSHARD, Op.REDUCE_GRAD))
            first = Action(max(rank, stage - shape.pp_size), Op.F, 0)
            assert gather < actions.index(first)
            last = actions.index(Action(stage, Op.B, shape.num_microbatches - 1))
            assert all(action.op is Op.SEND_B for action in actions[last + 1 : reduce])
            assert actions.count(Action(stage, Op.REDUCE_GRAD)) == 1


# Damage. The oracle runs all ranks by brute force, tracking what each message carries, and knows nothing of check.py.


def runs_to_the_same_result(plan, shape) -> bool:
    """Whether the plan computes what a sound one computes: in-order channels, rendezvous, sends waited for 2 later."""
    channels: dict = {}
    expected_order = {}
    position, held, done = [0] * len(plan), [{} for _ in plan], [set() for _ in plan]
    window = [[[]] for _ in plan]  # per rank, per recent compute action: (channel, number) of its sends
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(plan):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if action in done[rank] or shape.rank_of(action.stage) != rank:
                    return False
                if action.op in SENDS:
                    result = Action(action.stage, Op.F if action.op is Op.SEND_F else Op.B, action.microbatch)
                    if result not in done[rank] or peer(action, shape) is None:
                        return False
                    queue = channels.setdefault(channel(action, shape), ([], []))
                    window[rank][-1].append((channel(action, shape), len(queue[0])))
                    queue[0].append(peer(action, shape))
                elif action.op in RECEIVES:
                    if peer(action, shape) is None:
                        return False
                    queue = channels.setdefault(channel(peer(action, shape), shape), ([], []))
                    held[rank][action] = (channel(peer(action, shape), shape), len(queue[1]))
                    queue[1].append(action)
                elif action.op in COMPUTE:
                    key = rank, action.stage, action.op
                    due = [entry for sends in window[rank][:-1] for entry in sends]
                    if any(len(channels[name][1]) <= number for name, number in due):
                        break
                    if action.microbatch != expected_order.get(key, 0):
                        return False
                    receive = Action(action.stage, Op.RECV_F if action.op is Op.F else Op.RECV_B, action.microbatch)
                    if peer(receive, shape) is not None:
                        if receive not in held[rank]:
                            return False
                        name, number = held[rank][receive]
                        if len(channels[name][0]) <= number:
                            break
                        if channels[name][0][number] != receive:
                            return False
                    if action.op is Op.B and Action(action.stage, Op.F, action.microbatch) not in done[rank]:
                        return False
                    expected_order[key] = action.microbatch + 1
                    window[rank] = (window[rank] + [[]])[-2:]
                elif action.op is Op.REDUCE_GRAD:
                    if Action(action.stage, Op.B, shape.num_microbatches - 1) not in done[rank]:
                        return False
                elif Action(action.stage, Op.F, 0) in done[rank]:
                    return False
                done[rank].add(action)
                position[rank] += 1
                moved = True
    complete = all(at == len(actions) for at, actions in zip(position, plan))
    matched = all(sends == receives for sends, receives in channels.values())
    optional = (Op.UNSHARD, Op.REDUCE_GRAD)
    everything = {str(a) for actions in lower(breadth_first(shape), shape) for a in actions if a.op not in optional}
    return complete and matched and everything <= {str(a) for actions in plan for a in actions}


def damage(plan, chance: random.Random):
    rank = chance.randrange(len(plan))
    actions = plan[rank]
    one, two = chance.randrange(len(actions)), chance.randrange(len(actions))
    receives = [index for index, action in enumerate(actions) if action.op in RECEIVES]
    kind = chance.choice(["drop", "double", "swap", "swap receives", "move", "other microbatch", "other rank"])
    if kind == "drop":
        del actions[one]
    elif kind == "double":
        actions.insert(two, actions[one])
    elif kind == "swap receives" and len(receives) > 1:
        one, two = chance.sample(receives, 2)
        actions[one], actions[two] = actions[two], actions[one]
    elif kind == "move":
        actions.insert(two, actions.pop(one))
    elif kind == "other microbatch" and actions[one].microbatch is not None:
        actions[one] = actions[one]._replace(microbatch=actions[one].microbatch + chance.choice((-1, 1)))
    elif kind == "other rank":
        other = (rank + 1) % len(plan)
        plan[rank], plan[other] = plan[other], plan[rank]
    else:
        actions[one], actions[two] = actions[two], actions[one]
    return kind


def test_damaged_plans_are_rejected_exactly_when_their_meaning_changed():
    chance = random.Random(2211)
    rejected = accepted = 0
    for _ in range(3000):
        shape = PipelineShape(chance.randint(2, 5), chance.randint(1, 3), chance.randint(1, 6))
        plan = lower(breadth_first(shape, eager_backward=chance.random() < 0.5), shape)
        kind = damage(plan, chance)
        try:
            check(plan, shape)
            verdict = None
        except ScheduleError as error:
            verdict = str(error)
        same = runs_to_the_same_result([list(actions) for actions in plan], shape)
        if kind == "drop" and verdict is None:
            same = True  # an UNSHARD or REDUCE_GRAD: optional in a plan
        assert (verdict is None) == same, f"{kind} on {shape}: {verdict}\n{formats.to_text(plan)}"
        if verdict is not None:
            assert re.search(r"pp_rank \d+", verdict) and re.search(r"\d+(SEND_|RECV_)?[FB]\d*|UNSHARD|REDUCE", verdict)
        rejected, accepted = rejected + (verdict is not None), accepted + (verdict is None)
    assert rejected > 1500 and accepted > 50


def test_a_plan_that_only_a_buffering_transport_survives_is_rejected_with_every_rank():
    shape = PipelineShape(2, 2, 3)
    order = parse("0F0 0F1 0F2 2F0 2B0 2F1 2B1 2F2 2B2 0B0 0B1 0B2", "1F0 1F1 1F2 3F0 3B0 3F1 3B1 3F2 3B2 1B0 1B1 1B2")
    plan = lower(order, shape)
    check(plan, shape)
    late = [Action.parse("2RECV_F1"), Action.parse("2RECV_F2")]
    actions = [action for action in plan[0] if action not in late]
    at = actions.index(Action.parse("2F1"))
    plan[0] = actions[:at] + late + actions[at:]
    # Rank 1 may not run 3F0 before 1F1's output is received; rank 0 receives it only after 2B0, which needs 3F0.
    with pytest.raises(ScheduleError) as error:
        check(plan, shape)
    assert re.search(r"pp_rank 0: step \d+ 2B0 waits for SEND_B of pp_rank 1", str(error.value))
    assert re.search(r"pp_rank 1: step \d+ 3F0 waits for the receive of its SEND_F by pp_rank 0", str(error.value))


def test_orders_that_wait_in_a_circle_are_rejected_with_every_rank():
    shape = PipelineShape(2, 2, 2)
    order = parse("0F0 2F0 0F1 2F1 2B0 2B1 0B0 0B1", "3F0 1F0 1F1 3F1 3B0 3B1 1B0 1B1")
    with pytest.raises(ScheduleError) as error:
        lower(order, shape)
    assert "pp_rank 0: step 1 2F0 waits for 1F0 of pp_rank 1" in str(error.value)
    assert "pp_rank 1: step 0 3F0 waits for 2F0 of pp_rank 0" in str(error.value)


def test_text_and_csv_bring_every_plan_back():
    shape = PipelineShape(4, 2, 6)
    plan = lower(breadth_first(shape), shape)
    assert formats.from_text(formats.to_text(plan)) == plan
    assert formats.from_csv(formats.to_csv(plan)) == plan
    with pytest.raises(ValueError, match=r"line 2 \(pp_rank 1\): '9Q1' is not an action"):
        formats.from_text("0F0\n9Q1\n")


def test_torch_parses_every_action():
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules", reason="needs torch")
    shape = PipelineShape(3, 2, 4)
    for actions in lower(breadth_first(shape), shape):
        assert [str(pipelining._Action.from_str(str(action))) for action in actions] == list(map(str, actions))
