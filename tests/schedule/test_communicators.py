"""The communicators: one channel of a rank each, and the checker notices when that is no longer so."""

import importlib
import re
from collections import defaultdict

import pytest

from megatron_bfpp.schedule import Action, Op, PipelineShape, ScheduleError, breadth_first, check, forward_only, lower
from megatron_bfpp.schedule.ir import RECEIVES, SENDS, channel, communicator, peer

DRY_RUN = importlib.import_module("megatron_bfpp.schedule.dry_run")  # its function has the same name


@pytest.mark.parametrize("size", range(2, 10))
def test_a_rank_has_one_direction_of_one_kind_of_message_on_a_communicator(size):
    shape = PipelineShape(size, 3, 1)
    carried, names = defaultdict(set), set()
    for stage in range(shape.num_stages):
        for op in SENDS:
            if peer(Action(stage, op), shape) is not None:
                key = channel(Action(stage, op), shape)
                names.add(communicator(key, size))
                for rank in key[1:]:
                    carried[rank, communicator(key, size)].add(key)
    assert len(carried) == 4 * size  # two kinds, to and from
    assert all(len(channels) == 1 for channels in carried.values())
    assert len(names) == (4 if size % 2 == 0 else 6)


def one_per_kind(key, pp_size):
    return key[0], 0


def one_per_colour(key, pp_size):
    return Op.SEND_F, communicator(key, pp_size)[1]


def two_colours(key, pp_size):
    kind, source, target = key
    return kind, (source if kind is Op.SEND_F else target) % 2


@pytest.mark.parametrize(
    "wrong, sizes, blocked",
    [
        (one_per_kind, (2, 2, 1), "pp_rank 1: step 5 1F0 waits for SEND_F of pp_rank 0, behind 2RECV_F0"),
        (one_per_kind, (4, 2, 3), "pp_rank 3: step 10 3F0 waits for SEND_F of pp_rank 2, behind 2RECV_F0"),
        (one_per_colour, (2, 1, 1), "pp_rank 1: step 2 1F0 waits for SEND_F of pp_rank 0, behind 0RECV_B0"),
        (two_colours, (3, 2, 1), "pp_rank 1: step 6 1F0 waits for SEND_F of pp_rank 0, behind 3RECV_F0"),
    ],
)
def test_the_dry_run_notices_communicators_that_are_shared(wrong, sizes, blocked, monkeypatch):
    shape = PipelineShape(*sizes)
    own_queues = {"one_queue": False, "device_waits": False}
    # All receives first: sound where each has a stream to itself.
    plan = [sorted(actions, key=lambda each: each.op not in RECEIVES) for actions in lower(breadth_first(shape), shape)]
    check(plan, shape, **own_queues)
    monkeypatch.setattr(DRY_RUN, "communicator", wrong)
    with pytest.raises(ScheduleError, match="no rank can run its next action") as error:
        check(plan, shape, **own_queues)
    assert re.search(rf"{blocked} on one communicator$", str(error.value), re.MULTILINE), error.value


def test_sharing_that_no_plan_can_suffer_from_is_accepted(monkeypatch):
    # One chunk, forwards only: rank 1 posts a receive and sends its result, in turn. No wait goes around the ring.
    monkeypatch.setattr(DRY_RUN, "communicator", one_per_kind)
    shape = PipelineShape(3, 1, 4)
    check(lower(forward_only(shape), shape), shape, forward_only=True)


def test_crossed_messages_are_named_with_both_ends():
    shape = PipelineShape(2, 1, 2)
    plan = lower(breadth_first(shape), shape)
    assert plan[1][1:3] == [Action(1, Op.RECV_F, 0), Action(1, Op.RECV_F, 1)]
    plan[1][1:3] = plan[1][2:0:-1]
    crossed = "pp_rank 0 step 2 0SEND_F0 meets pp_rank 1 step 1 1RECV_F1"
    with pytest.raises(ScheduleError, match=f"^messages from pp_rank 0 to pp_rank 1 are crossed: {crossed}$"):
        check(plan, shape)


def test_an_evaluation_reduces_no_gradients():
    shape = PipelineShape(2, 1, 2)
    plan = lower(forward_only(shape), shape)
    plan[1].append(Action(1, Op.REDUCE_GRAD))
    with pytest.raises(ScheduleError, match="pp_rank 1: step 4 1REDUCE_GRAD does not belong to this rank"):
        check(plan, shape, forward_only=True)
