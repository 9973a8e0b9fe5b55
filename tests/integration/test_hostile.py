"""On a transport as unkind as NCCL may be (hostile.py) breadth-first trains to the bits of Megatron's default."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from gpt import ZERO_1, flags_of, losses, train
from hostile import hostile, late_headers
from jobs import run_job

from megatron_bfpp.integration import process
from megatron_bfpp.integration.flags.settings import Settings
from megatron_bfpp.runtime import headers, p2p

pytestmark = pytest.mark.slow


def use_the_hostile_transport(one_queue=False):
    p2p.dist, headers.dist = hostile(int(os.environ["RANK"]), one_queue), late_headers(int(os.environ["RANK"]))


@pytest.mark.parametrize(
    "pp, chunks, dp, microbatches, more, ours",
    [
        (4, 2, 1, 8, (), ()),
        (4, 2, 1, 8, (), ("--breadth-first-backward", "late")),
        (4, 2, 1, 8, (), ("--breadth-first-group-size", "5")),
        (2, 4, 1, 4, (), ()),  # both neighbours are one rank
        (2, 2, 2, 4, ZERO_1, ()),
        (3, 2, 1, 6, ("--num-layers", "6"), ()),  # an odd ring has a third colour
    ],
)
def test_losses_are_bit_identical_on_the_hostile_transport(pp, chunks, dp, microbatches, more, ours, tmp_path):
    flags = flags_of(pp, chunks, 1, dp, microbatches) + more
    found = train(
        tmp_path, pp * dp, *flags, "--pipeline-schedule", "breadth-first", *ours, prepare=use_the_hostile_transport
    )
    assert found == losses(pp * dp, *flags) and len(found) == 3


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_headers_block_nothing_on_the_hostile_transport_with_own_queues_and_with_one(ranks, tmp_path):
    run_job(_headers, ranks, tmp_path)


def _headers() -> None:
    """With --bfpp-debug-p2p and with sequences of any length, in the shapes of the tests above, and M = 1 and P + 1."""
    from chunks import assert_same, batch, chunks, schedules, start, step

    from megatron_bfpp.integration.step import groups

    ranks = int(os.environ["WORLD_SIZE"])
    num_chunks = 4 if ranks == 2 else 2
    start(num_chunks)
    default, ours = schedules()
    lengths = [3, 7, 2, 5, 1, 9, 4, 4]
    variable = {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    step(ours, chunks(num_chunks), batch(ranks))
    assert not groups._headers, "a group for headers that nobody asked for"
    late, grouped = {"backward": "late"}, {"group_size": ranks + 1}
    for is_debug, config in ((True, {}), (False, variable)):
        model = chunks(num_chunks, **config)
        for microbatches, orders in ((2 * ranks, ({}, late, grouped)), (1, ({},)), (ranks + 1, ({},))):
            data = batch(microbatches, lengths=None if is_debug else lengths[:microbatches])
            reference = step(default, model, data) if microbatches % ranks == 0 else None  # it refuses the others
            for order in orders:
                settings = Settings("breadth-first", debug_p2p=is_debug, **order)
                process.settings = lambda settings=settings: settings
                for one_queue in (False, True) if order is orders[0] else (True,):
                    use_the_hostile_transport(one_queue)
                    found = step(ours, model, data)
                    reference = reference or found
                    assert_same(reference, found)
    assert len(groups._headers) == 1


def test_the_transport_is_hostile(tmp_path):
    # A test of the tests: it shows a receive without its wait and a tensor that is reused before the wait of its send.
    for output in run_job(_misuse, 2, tmp_path):
        assert "misuse seen" in output


def _misuse() -> None:
    dist.init_process_group("gloo")
    transport, tensor = hostile(seed=3), torch.zeros(2)
    if dist.get_rank() == 0:
        work = transport.isend(tensor, 1, group=dist.group.WORLD)
        tensor.fill_(7)
        work.wait()
        blocked = transport.isend(tensor, 1, group=dist.group.WORLD)
        time.sleep(0.1)
        assert not blocked.done.is_set(), "a send was complete before its receive was launched"
        dist.barrier(group=dist.new_group([0, 1]))
        blocked.wait()
    else:
        work = transport.irecv(tensor, 0, group=dist.group.WORLD)
        time.sleep(0.1)
        assert tensor.isnan().all()
        work.wait()
        assert tensor.tolist() == [7, 7], "the tensor was read before the sender changed it"
        dist.barrier(group=dist.new_group([0, 1]))
        transport.irecv(tensor, 0, group=dist.group.WORLD).wait()
    print("misuse seen")
