"""What the ranks really launch, under CUDA's rules: it takes the time that is predicted, and nothing hangs.

recorded.py records it on torch's fake process group; cuda_rules.py says what a GPU makes of it.
"""

import json

import pytest
from cuda_rules import Hang, hanging_waits, one, own, run, step_time

from megatron_bfpp.schedule import PipelineShape, breadth_first, lower
from megatron_bfpp.schedule.buffers import after_sends
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.schedule.replay import replay

pytest.importorskip("torch")

from jobs import run_job
from recorded import COMPUTE, programmes, record
from recorded_loop import record_step

HOPS = (0.1, 0.25, 0.5)  # latency of a message over the time of a forward
SMALL = [(2, 1, 3), (2, 2, 1), (2, 3, 2), (2, 2, 4), (3, 2, 2), (3, 1, 6), (3, 2, 3), (4, 2, 1), (4, 2, 4)]


def planned(sizes, eager=True, **more):
    """A shape and its plan."""
    shape = PipelineShape(*sizes)
    return shape, lower(breadth_first(shape, eager_backward=eager), shape, **more)


def bound(shape):
    """The shortest step without a network, with forwards of 1 and backwards of 2."""
    size, chunks, microbatches = shape.pp_size, shape.num_chunks, shape.num_microbatches
    return 3 * ((chunks - 1) * max(microbatches, size) + microbatches + size - 1)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("sizes", [(4, 2, 3), (4, 2, 9), (3, 2, 4), (2, 3, 1), (2, 3, 5), (2, 1, 2), (8, 4, 8)])
def test_every_action_ends_when_replay_says(sizes, eager):
    shape, plan = planned(sizes, eager)
    recorded = record(plan, shape)
    for hop in (0, 0.25, 1.5):
        found = replay(plan, shape, Costs(transfer=hop))
        ends = run(programmes(recorded), hop)
        for spans, recorder, times in zip(found.spans, recorded, ends, strict=True):
            named = {entry.name: end for entry, end in zip(recorder.programme, times) if entry.stream == COMPUTE}
            assert {str(span.action): span.end for span in spans}.items() <= named.items()


def test_one_communicator_for_a_group_runs_as_one_for_each_pair_of_ranks():
    for sizes in SMALL:
        shape, plan = planned(sizes)
        per_pair, per_group = (programmes(record(plan, shape, per_pair=choice)) for choice in (True, False))
        assert run(per_pair, 0.25) == run(per_group, 0.25)


HEADERS = [(4, 2, 8), (2, 4, 4), (2, 2, 4), (3, 2, 6), *SMALL]  # of the hostile transport's tests, and smaller ones


@pytest.mark.parametrize("queue", [own, one])
@pytest.mark.parametrize("eager", [True, False])
def test_headers_hang_nothing_and_cost_no_time_where_sizes_are_known(queue, eager):
    for sizes in HEADERS:
        shape, plan = planned(sizes, eager)
        plain, debug = (programmes(record(plan, shape, with_headers=choice)) for choice in (False, True))
        assert step_time(debug, 0.25, queue) == step_time(plain, 0.25, queue)
        moved = programmes(record(after_sends(plan, shape), shape, with_headers=True, variable_shapes=True))
        assert step_time(moved, 0.25, queue) >= bound(shape)
        assert not any(hanging_waits(moved, queue)), "the host may even wait for the device anywhere"


def test_two_ranks_that_wait_for_sizes_where_receives_are_posted_ahead_wait_for_each_other():
    shape, plan = planned((2, 2, 4))
    with pytest.raises(Hang, match="the wait for the header"):
        run(programmes(record(plan, shape, with_headers=True, variable_shapes=True)))


GROUPED = {"microbatch_group_size_per_vp_stage": 16, "overlap_p2p_comm_warmup_flush": True}
LOOPS = {"default": (False, {}), "grouped": (False, GROUPED), "ours": (True, {})}


def _write_step_times(path):
    """Step / bound of each loop for each of HOPS, with own queues and with one."""
    shape, found = PipelineShape(8, 4, 16), {}
    for name, (is_ours, config) in LOOPS.items():
        launches = record_step(shape, is_ours, **config)
        found[name] = [
            [round(step_time(launches, hop, queue) / bound(shape), 3) for hop in HOPS] for queue in (own, one)
        ]
    path.write_text(json.dumps(found))


@pytest.mark.slow
def test_the_step_of_megatrons_own_loop_and_of_ours_behind_megatrons_call(tmp_path):
    run_job(_write_step_times, 1, tmp_path, tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "default": [[1.044, 1.114, 1.232]] * 2,
        "grouped": [[1.031, 1.085, 1.174], [1.031, 1.085, 1.221]],
        "ours": [[1.007, 1.016, 1.033], [1.044, 1.115, 1.254]],  # receives are placed for no latency
    }
