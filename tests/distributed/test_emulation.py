"""Emulated collectives: when they begin and end, told by the clock of the emulated compute stream, which nothing here waits for."""

import multiprocessing

import pytest
from jobs import run_job


def collectives(shared_card: bool):
    """Of this rank: what launches and waits, with links of 1 byte per second."""
    import torch.distributed as dist

    from megatron_bfpp.emulate.collectives import Collectives
    from megatron_bfpp.emulate.network import NUMBERS_PER_CARD, Link, Network

    dist.init_process_group("gloo")
    cards = multiprocessing.get_context("spawn").Array("d", NUMBERS_PER_CARD * dist.get_world_size())
    network = Network(Link("slow", bandwidth=1.0, collectives_share_card=shared_card), 5.0, cards)
    return network, Collectives(network, dist.group.WORLD)


def begins_with_the_last_rank_and_after_the_one_before():
    import torch.distributed as dist

    network, ours = collectives(False)
    network.stream_s = 100.0 + 10.0 * dist.get_rank()
    first = ours.launch(3.0)
    network.stream_s += 1.0
    second, third = ours.launch(4.0), ours.launch(2.0)
    network.stream_s = 200.0
    late = ours.launch(1.0)
    for collective, end_s in ((third, 119.0), (late, 201.0)):  # 110 + 3 + 4 + 2; and on a free network
        network.stream_s = 0.0
        ours.wait(collective)
        assert network.stream_s == end_s
    assert (first.end_s, second.end_s) == (113.0, 117.0)
    ours.are_free = True
    network.stream_s = 300.0
    free = ours.launch(9.0)
    ours.wait(free)
    assert network.stream_s == 300.0


def a_message_and_a_collective_on_one_card_slow_each_other_down():
    import torch.distributed as dist

    network, ours = collectives(True)
    network.stream_s = 100.0
    collective = ours.launch(20.0)
    collective.work.wait()
    network.before_message()
    rank = dist.get_rank()
    assert network.occupy(rank, rank, 5.0) == 105.0  # begins as much later as it takes longer
    ours.wait(collective)
    assert network.stream_s == 125.0 + 5.0  # once for the card that sends, once for the one that receives: the same card here
    network.stream_s = 200.0
    assert network.occupy(rank, rank, 5.0) == 200.0  # nothing else is under way


@pytest.mark.parametrize(
    "job", [begins_with_the_last_rank_and_after_the_one_before, a_message_and_a_collective_on_one_card_slow_each_other_down]
)
def test_a_collective(job, tmp_path):
    run_job(job, 2, tmp_path)
