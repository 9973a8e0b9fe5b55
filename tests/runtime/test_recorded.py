"""What the ranks really launch, under CUDA's rules: it takes the time that is predicted, and nothing hangs.

recorded.py records it on torch's fake process group; cuda_rules.py says what a GPU makes of it.
"""

import json
import os
import random
from itertools import product

import pytest
from cuda_rules import Hang, Mismatch, hanging_waits, one, own, run, step_time, with_waits

from megatron_bfpp.schedule import PipelineShape, ScheduleError, breadth_first, check, forward_only, lower
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.schedule.ir import COMPUTE as COMPUTES
from megatron_bfpp.schedule.ir import MESSAGE, RECEIVES
from megatron_bfpp.schedule.orders import weight_lags
from megatron_bfpp.schedule.replay import replay

pytest.importorskip("torch")

from jobs import run_job
from recorded import COMPUTE, programmes, record
from recorded_loop import record_step

HOPS = (0.1, 0.25, 0.5)  # latency of a message over the time of a forward
CONNECTIONS = {own: None, one: 1}
SMALL = [(2, 1, 3), (2, 2, 1), (2, 3, 2), (2, 2, 4), (3, 2, 2), (3, 1, 6), (3, 2, 3), (4, 2, 1), (4, 2, 4)]


BACKWARDS = ["eager", "late", "split", "split and late"]


def planned(sizes, backward="eager", **more):
    """A shape and its plan."""
    shape = PipelineShape(*sizes)
    lags = weight_lags(shape) if "split" in backward else None
    return shape, lower(breadth_first(shape, eager_backward="late" not in backward, weight_lag=lags), shape, **more)


def bound(shape):
    """The shortest step without a network, with forwards of 1 and backwards of 2."""
    size, chunks, microbatches = shape.pp_size, shape.num_chunks, shape.num_microbatches
    return 3 * ((chunks - 1) * max(microbatches, size) + microbatches + size - 1)


def hangs(launches, queue=own):
    try:
        run(launches, queue=queue)
    except Hang:
        return True
    return False


def can_hang(launches):
    """Whether they hang on queues of their own or on one, by themselves or with a device-wide wait at some place."""
    try:
        return any(any(hanging_waits(launches, queue)) for queue in (own, one))
    except (Hang, Mismatch):
        return True


@pytest.mark.parametrize("queue", [own, one])
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("sizes", [(4, 2, 3), (3, 2, 4), (2, 3, 5), (2, 1, 2), (6, 3, 7)])
def test_every_action_ends_when_replay_says(sizes, backward, queue):
    shape, plan = planned(sizes, backward)
    for hop, gather, reduction in ((0.25, 0, 0), (1.5, 2, 5)):
        costs = Costs(transfer=hop, gather=gather, reduction=reduction)
        found = replay(plan, shape, costs, connections=CONNECTIONS[queue])
        recorded = record(plan, shape, costs)
        ends = run(programmes(recorded), hop, queue)
        assert found.step_time == max(map(max, ends))
        for spans, recorder, times in zip(found.spans, recorded, ends, strict=True):
            named = {entry.name: end for entry, end in zip(recorder.programme, times) if entry.stream == COMPUTE}
            assert {str(span.action): span.end for span in spans}.items() <= named.items()


def test_with_one_queue_the_step_is_as_near_to_its_bound_as_with_queues_of_their_own():
    for hop, most in zip(HOPS, (1.01, 1.02, 1.04)):
        shape, plan = planned((8, 4, 16), hop=hop)
        launches = programmes(record(plan, shape))
        found = [step_time(launches, hop, queue) / bound(shape) for queue in (own, one)]
        assert found[0] == pytest.approx(found[1]) and found[1] <= most


def test_receives_that_are_placed_for_no_latency_take_the_gain_away_on_one_queue():
    shape, plan = planned((8, 4, 16), hop=0.0)
    launches = programmes(record(plan, shape))
    assert [round(step_time(launches, hop, one) / bound(shape), 3) for hop in HOPS] == [1.044, 1.115, 1.254]


def test_queues_that_streams_share_at_random_lose_nothing_up_to_the_latency_that_receives_are_placed_for():
    shape, plan = planned((6, 2, 12), hop=0.25)
    launches = programmes(record(plan, shape))
    for seed in range(4):
        queue = shared_by_chance(launches, seed)
        assert step_time(launches, 0.25, queue) == step_time(launches, 0.25)
        assert step_time(launches, 0.5, queue) <= 1.1 * step_time(launches, 0.5)


def shared_by_chance(launches, seed):
    """Give each stream one of 8 hardware queues: the default of CUDA_DEVICE_MAX_CONNECTIONS."""
    chosen = random.Random(seed)
    streams = ((rank, entry.stream) for rank, programme in enumerate(launches) for entry in programme)
    queues = {stream: chosen.randrange(8) for stream in dict.fromkeys(streams)}
    return lambda rank, stream: queues[rank, stream]


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("size", range(2, 9))
def test_no_device_wait_at_any_place_hangs(size, backward):
    """BFPP_ALL_CASES=1: every shape that the checker proves in test_every_shape.py."""
    all_cases = product(range(1, 5), range(1, 25))
    some_cases = ((2, 1), (1, 2), (2, size - 1), (2, size), (1, 2 * size), (3, size + 1))
    for chunks, microbatches in all_cases if os.environ.get("BFPP_ALL_CASES") == "1" else some_cases:
        shape, plan = planned((size, chunks, microbatches), backward)
        assert not can_hang(programmes(record(plan, shape))), shape


@pytest.mark.parametrize("hop", [0.0, 2.0])
@pytest.mark.parametrize("sizes", SMALL[:6])
def test_no_device_wait_before_any_action_hangs_tried_one_by_one(sizes, hop):
    shape, plan = planned(sizes, hop=hop)
    recorded = record(plan, shape)
    launches = programmes(recorded)
    for rank, recorder in enumerate(recorded):
        for place in recorder.begins:
            stopped = [*launches[:rank], with_waits(launches[rank], [place]), *launches[rank + 1 :]]
            assert not any(hangs(stopped, queue) for queue in (own, one)), (rank, place)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_in_the_first_step_all_ranks_may_wait_around_every_computation(backward):
    for sizes in SMALL:
        shape, plan = planned(sizes, backward, hop=None)
        stopped = []
        for recorder, actions in zip(record(plan, shape), plan, strict=True):
            ends = [*recorder.begins[1:], len(recorder.programme)]
            bounds = [
                (begin, end) for action, begin, end in zip(actions, recorder.begins, ends) if action.op in COMPUTES
            ]
            stopped.append(with_waits(recorder.programme, [place for each in bounds for place in each]))
        assert not any(hangs(stopped, queue) for queue in (own, one)), sizes


def test_an_evaluation_hangs_nowhere():
    for sizes in SMALL:
        shape = PipelineShape(*sizes)
        launches = programmes(record(lower(forward_only(shape), shape), shape, forward_only=True))
        assert not can_hang(launches), shape


HEADERS = [(4, 2, 8), (2, 4, 4), (2, 2, 4), (3, 2, 6), *SMALL]  # of the hostile transport's tests, and smaller ones


@pytest.mark.parametrize("queue", [own, one])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_headers_hang_nothing_and_cost_no_time_where_sizes_are_known(queue, backward):
    for sizes in HEADERS:
        shape, plan = planned(sizes, backward)
        plain, debug = (programmes(record(plan, shape, with_headers=choice)) for choice in (False, True))
        assert step_time(debug, 0.25, queue) == step_time(plain, 0.25, queue)
        moved = programmes(
            record(planned(sizes, backward, hop=None)[1], shape, with_headers=True, variable_shapes=True)
        )
        assert step_time(moved, 0.25, queue) >= (step_time(plain) if "split" in backward else bound(shape))
        assert not any(hanging_waits(moved, queue)), "the host may even wait for the device anywhere"


def test_two_ranks_that_wait_for_sizes_where_receives_are_posted_ahead_wait_for_each_other():
    shape, plan = planned((2, 2, 4))
    with pytest.raises(Hang, match="the wait for the header"):
        run(programmes(record(plan, shape, with_headers=True, variable_shapes=True)))


def test_a_wait_for_every_launch_hangs_whatever_the_plan():
    """Why CUDA_LAUNCH_BLOCKING is refused."""
    for hop in (0.25, None):
        shape, plan = planned((2, 2, 4), hop=hop)
        with pytest.raises(Hang, match=r"pp_rank 0: .* its host is in"):
            run(programmes(record(plan, shape)), launch_blocking=True)


def test_one_communicator_for_a_group_runs_as_one_for_each_pair_of_ranks():
    for sizes in SMALL:
        shape, plan = planned(sizes)
        per_pair, per_group = (programmes(record(plan, shape, per_pair=choice)) for choice in (True, False))
        assert run(per_pair, 0.25) == run(per_group, 0.25)


def damage(plan, rng):
    """Move one receive to another place before the computation that needs it."""
    plan = [list(actions) for actions in plan]
    actions = rng.choice([actions for actions in plan if any(each.op in RECEIVES for each in actions)])
    at = rng.choice([at for at, each in enumerate(actions) if each.op in RECEIVES])
    receive = actions.pop(at)
    needed = actions.index(
        next(each for each in actions if (each.stage, MESSAGE.get(each.op), each.microbatch) == receive)
    )
    actions.insert(rng.randint(max(0, at - 6), min(needed, at + 6)), receive)
    return plan


@pytest.mark.slow
def test_check_refuses_what_can_hang_and_nothing_else():
    """On one queue or own ones, with a wait for the device at some place of some rank or without."""
    refused = 0
    for seed in range(120):
        rng = random.Random(seed)
        shape, plan = planned(rng.choice(SMALL), rng.choice(BACKWARDS), hop=rng.choice([0.0, 0.25, 1.0]))
        plan = damage(plan, rng)
        try:
            check(plan, shape)
            complaint = None
        except ScheduleError as error:
            complaint, refused = str(error), refused + 1
        assert can_hang(programmes(record(plan, shape))) == (complaint is not None), (seed, complaint)
    assert 20 < refused < 100


GROUPED = {"microbatch_group_size_per_vp_stage": 16, "overlap_p2p_comm_warmup_flush": True}
LOOPS = {"default": (False, {}), "grouped": (False, GROUPED), "ours": (True, {})}


def _write_step_times(path):
    """Step / bound of each loop for each of HOPS, with own queues and with one; whether it goes on if all ranks wait
    for their devices before every computation."""
    shape, found = PipelineShape(8, 4, 16), {}
    for name, (is_ours, config) in LOOPS.items():
        launches = record_step(shape, is_ours, **config)
        found[name] = [
            [round(step_time(launches, hop, queue) / bound(shape), 3) for hop in HOPS] for queue in (own, one)
        ]
        computed = [[at for at, entry in enumerate(each) if entry.stream == COMPUTE] for each in launches]
        found[name].append(not hangs(list(map(with_waits, launches, computed))))
    path.write_text(json.dumps(found))


@pytest.mark.slow
def test_the_step_of_megatrons_own_loop_and_of_ours_behind_megatrons_call(tmp_path):
    run_job(_write_step_times, 1, tmp_path, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "default": [[1.044, 1.114, 1.232], [1.044, 1.114, 1.232], True],
        "grouped": [[1.031, 1.085, 1.174], [1.031, 1.085, 1.221], True],
        "ours": [[1.007, 1.016, 1.033], [1.007, 1.016, 1.117], False],  # receives are placed for a hop of 0.25
    }
