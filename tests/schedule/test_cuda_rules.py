"""The rules of CUDA and NCCL (support/cuda_rules.py), one at a time, on programmes of a few commands."""

import random

import pytest
from cuda_rules import (
    Command,
    End,
    Hang,
    HostMessage,
    HostWait,
    Mismatch,
    hanging_waits,
    one,
    own,
    run,
    step_time,
    with_waits,
)


def kernel(duration=1.0, after=(), stream="compute"):
    return Command(f"a kernel of {duration}", stream, duration, after)


def send(peer, communicator="A", after=(), content=None):
    return Command(f"a send to {peer}", communicator, 0.0, after, End(communicator, peer, True, content))


def receive(peer, communicator="A", after=(), content=None):
    return Command(f"a receive from {peer}", communicator, 0.0, after, End(communicator, peer, False, content))


def test_a_stream_is_in_order_and_two_streams_run_at_a_time():
    assert run([[kernel(1), kernel(2), kernel(4, stream="other")]]) == [[1, 3, 4]]


def test_a_command_waits_for_the_events_that_were_given_to_it():
    first = kernel(3)
    assert run([[first, kernel(1, [first], "other"), kernel(1, stream="third")]]) == [[3, 4, 1]]


def test_a_send_and_its_receive_end_together_a_hop_after_the_later_of_them_has_started():
    early, late = kernel(1), kernel(5)
    assert run([[early, send(1, after=[early])], [late, receive(0, after=[late])]], hop=0.5) == [[1, 5.5], [5, 5.5]]


def test_the_messages_of_a_communicator_take_one_hop_after_the_other():
    assert run([[send(1), send(1), send(1, "B")], [receive(0), receive(0), receive(0, "B")]], hop=2)[1] == [2, 4, 2]


def test_messages_are_matched_by_their_order_alone():
    ranks = [send(1, content="x"), send(1, content="y")], [receive(0, content="y"), receive(0, content="x")]
    with pytest.raises(Mismatch, match="a send to 1 is matched with a receive from 0"):
        run(ranks)


def test_with_one_queue_a_command_that_cannot_start_blocks_all_behind_it_and_one_that_has_started_does_not():
    behind = kernel(1)
    sender = [kernel(10), send(1), send(1)]
    sender[1].after = [sender[0]]
    # The first receive starts at once and spins. The second cannot: its stream is busy until 10.
    assert run([sender, [receive(0), behind, receive(0)]], 0.0, one)[1] == [10, 1, 10]
    assert run([sender, [receive(0), receive(0), behind]], 0.0, one)[1] == [10, 10, 11]
    assert run([sender, [receive(0), receive(0), behind]], 0.0, own)[1] == [10, 10, 1]


def test_streams_may_share_a_queue():
    first = kernel(3)
    programme = [first, kernel(1, [first], "A"), kernel(1, stream="B"), kernel(1, stream="C")]
    assert run([programme], queue=lambda rank, stream: stream in "AB") == [[3, 4, 4, 1]]


def test_a_host_that_takes_time_to_launch_and_one_that_waits_for_each_launch():
    programme = [kernel(1), kernel(1, stream="other")]
    assert run([programme], launch_cost=0.25) == [[1.25, 1.5]]
    assert run([programme], launch_blocking=True) == [[1, 2]]


def test_two_ranks_that_receive_before_they_send_hang_where_each_launch_is_waited_for():
    ranks = [receive(1, "A"), send(1, "B")], [receive(0, "B"), send(0, "A")]
    assert step_time(ranks, hop=1) == 1
    with pytest.raises(Hang, match=r"pp_rank 0: a receive from 1 waits for its other end; its host is in a receive"):
        run(ranks, launch_blocking=True)


def test_a_message_without_its_other_end_hangs():
    with pytest.raises(Hang) as error:
        run([[send(1), send(1), kernel()], [receive(0)]])
    assert str(error.value) == "no rank can go on:\n  pp_rank 0: a send to 1 waits for its other end"


def test_a_device_wait_hangs_where_what_was_launched_before_needs_what_is_launched_after():
    # Rank 1 answers what it receives. Rank 0 asks for the answer before it sends.
    ask, answer = receive(1, "B"), receive(0)
    ranks = [[kernel(), ask, send(1), kernel()], [answer, send(0, "B", after=[answer])]]
    assert hanging_waits(ranks) == [[2], []]
    assert step_time([with_waits(ranks[0], [1, 3]), with_waits(ranks[1], [0, 1])]) == 2
    with pytest.raises(Hang) as error:
        run([with_waits(ranks[0], [2]), ranks[1]])
    assert str(error.value).splitlines()[1:] == [
        "  pp_rank 0: a receive from 1 waits for its other end; its host is in a device-wide wait",
        "  pp_rank 1: a receive from 0 waits for its other end",
    ]


def test_a_message_between_hosts_waits_for_no_device_and_may_be_waited_for_by_the_host():
    header = HostMessage("a header", End("gloo", 0, False))
    sender = [kernel(5), HostMessage("a header", End("gloo", 1, True))]
    assert run([sender, [header, HostWait(header), kernel(1)]])[1] == [0, 0, 1]
    with pytest.raises(Hang, match="pp_rank 1: a header waits for its other end; its host is in the wait for a header"):
        run([sender[:1], [header, HostWait(header), kernel(1)]])


def random_ranks(rng):
    """Programmes of 2 or 3 ranks: messages in an order that all agree on, each receive posted somewhat earlier."""
    size, ranks = rng.randint(2, 3), None
    ranks = [[] for _ in range(size)]
    for _ in range(rng.randint(2, 8)):
        source, target = rng.sample(range(size), 2)
        name = rng.choice("AB"), source, target
        for each, make, other in ((source, send, target), (target, receive, source)):
            last = next((entry for entry in reversed(ranks[each]) if entry.stream == "compute"), None)
            ends = [entry for entry in ranks[each] if entry.stream != "compute"]
            message = make(other, name, [last] if last is not None and make is send else ())
            at = len(ranks[each]) if make is send else rng.randint(max(0, len(ranks[each]) - 3), len(ranks[each]))
            ranks[each].insert(at, message)
            ranks[each].append(kernel(1, rng.sample(ends, min(len(ends), 1))))
    return ranks


def test_the_waits_that_hang_are_found_as_by_trying_each():
    found = 0
    for seed in range(80):
        ranks = random_ranks(random.Random(seed))
        for queue in (own, one):
            try:
                run(ranks, queue=queue)
            except (Hang, Mismatch):
                continue
            tried = [
                [place for place in range(len(rank)) if hangs(ranks, at, place, queue)] for at, rank in enumerate(ranks)
            ]
            assert hanging_waits(ranks, queue) == tried, seed
            found += sum(map(len, tried))
    assert found > 20


def hangs(ranks, rank, place, queue):
    """Whether one device-wide wait of a rank hangs the step."""
    try:
        run([with_waits(each, [place] if at == rank else []) for at, each in enumerate(ranks)], queue=queue)
    except Hang:
        return True
    return False
