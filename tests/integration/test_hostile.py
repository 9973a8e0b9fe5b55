"""On a transport as unkind as NCCL may be (hostile.py) breadth-first trains to the bits of Megatron's default."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from gpt import ZERO_1, flags_of, losses, train
from hostile import hostile
from jobs import run_job

from megatron_bfpp.runtime import p2p

pytestmark = pytest.mark.slow


def use_the_hostile_transport():
    p2p.dist = hostile(seed=int(os.environ["RANK"]))


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
def test_sequences_of_any_length_are_bit_identical_on_the_hostile_transport(ranks, tmp_path):
    run_job(_any_lengths, ranks, tmp_path)


def _any_lengths() -> None:
    from chunks import assert_same, batch, both, chunks, schedules, start, step

    start(num_chunks=3)
    use_the_hostile_transport()
    for lengths in ([3, 7, 2, 5], [4], [1, 9, 9, 1, 6, 2, 8, 5]):
        model = chunks(3, variable_seq_lengths=True, moe_token_dispatcher_type="alltoall")
        data = batch(len(lengths), lengths=lengths)
        if len(lengths) % dist.get_world_size() == 0:
            assert_same(*both(model, data))
        else:  # Megatron refuses these
            step(schedules()[1], model, data)


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
