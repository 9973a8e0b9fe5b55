"""Transfers on shared cards: by hand, against the arithmetic, and in predictions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import parse, shapes

from megatron_bfpp.schedule import PipelineShape, breadth_first, interleaved_1f1b, lower
from megatron_bfpp.schedule.cards import Cards, Transfer, receiving, sending
from megatron_bfpp.schedule.costs import MEGATRON, TORCH, Costs
from megatron_bfpp.schedule.lower import aligned
from megatron_bfpp.schedule.replay import replay

OUT = (sending(0),)


def ends(*transfers: tuple[float, Transfer]) -> dict[str, float]:
    cards, found = Cards(), {}
    for start, transfer in transfers:
        cards.begin(transfer, start)
    while done := cards.step():
        found.update({key: pytest.approx(cards.now) for key in done})
    return found


def test_two_at_a_time_have_half_each_and_the_second_the_rest_alone():
    # From 2 to 6 both are under way: 4 time units in which each gets 2.
    assert ends((0, Transfer("long", 6, OUT, 1)), (2, Transfer("short", 2, OUT, 2))) == {"short": 6, "long": 8}
    # The first is nearly done when the second begins.
    assert ends((0, Transfer("a", 3, OUT, 1)), (2, Transfer("b", 4, OUT, 2))) == {"a": 4, "b": 7}
    assert ends(*((0, Transfer(name, 1, OUT, name)) for name in "abc")) == {"a": 3, "b": 3, "c": 3}


def test_the_two_directions_of_a_card_and_different_cards_do_not_meet():
    assert ends((0, Transfer("out", 2, OUT, 1)), (0, Transfer("in", 3, (receiving(0),), 2))) == {"out": 2, "in": 3}
    assert ends((0, Transfer("0", 2, OUT, 1)), (0, Transfer("1", 2, (sending(1),), 2))) == {"0": 2, "1": 2}


def test_the_busiest_of_its_places_decides():
    ring = (sending(0), receiving(0))
    both = ends(
        (0, Transfer("ring", 4, ring, 1)), (0, Transfer("out", 1, OUT, 2)), (0, Transfer("in", 1, (receiving(0),), 3))
    )
    assert both == {"out": 2, "in": 2, "ring": 5}  # for 2 at half speed, not at a third


def test_a_queue_goes_one_after_the_other():
    assert ends((0, Transfer("a", 2, OUT, 1)), (1, Transfer("b", 2, OUT, 1)), (9, Transfer("c", 2, OUT, 1))) == {
        "a": 2,
        "b": 4,
        "c": 11,
    }


def test_time_passes_in_pieces_as_at_once():
    cards = Cards()
    cards.begin(Transfer("long", 6, OUT, 1), 0)
    assert cards.step(1) == [] and cards.now == 1
    cards.begin(Transfer("short", 2, OUT, 2), 0.5)  # its start is past: it begins now
    assert cards.next_end() == 3 and cards.step(4) == [] and cards.step(10) == ["short"] and cards.now == 5
    assert cards.step(10) == ["long"] and cards.now == 8 and cards.step(10) == [] and cards.now == 10


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), min_size=1, max_size=8))
def test_a_card_is_never_idle_and_loses_nothing(transfers):
    found = ends(*((start, Transfer(number, size, OUT, number)) for number, (start, size) in enumerate(transfers)))
    free = 0.0
    for start, size in sorted(transfers):
        free = max(free, start) + size
    assert max(each.expected for each in found.values()) == pytest.approx(free)


def test_a_message_during_a_reduction_takes_twice_its_time_and_prolongs_it_by_its_own():
    shape = PipelineShape(2, 2, 1)
    plan = parse(
        "0F0 0SEND_F0 2RECV_F0 2F0 2SEND_F0 2RECV_B0 2B0 2REDUCE_GRAD 2SEND_B0 0RECV_B0 0B0 0REDUCE_GRAD",
        "1RECV_F0 1F0 1SEND_F0 3RECV_F0 3F0 3B0 3REDUCE_GRAD 3SEND_B0 1RECV_B0 1B0 1REDUCE_GRAD 1SEND_B0",
    )
    alone, shared = (
        replay(plan, shape, Costs(1, 1, transfer=0.5, reduction=4, shared_card=each)) for each in (False, True)
    )
    times = [{str(span.action): span.start for rank in each.spans for span in rank} for each in (alone, shared)]
    # 3B0 ends at 6.5; its gradient leaves with the reduction of stage 3 under way: 1 rather than 0.5.
    assert times[0]["2B0"] == 7.0 and times[1]["2B0"] == 7.5
    # 2B0 ends at 8.5; rank 0 reduces stage 2 from then on, rank 1 is at it until 11: 2SEND_B0 takes 1 on both.
    assert times[1]["1B0"] == 9.5
    # Rank 1 ends 1B0 at 10.5. Its first reduction, 4 and twice 0.5 of messages, one each way, ends at 11.5.
    # 1SEND_B0 falls in it too.
    assert times[1]["0B0"] == 11.5
    assert shared.reduced[1] == pytest.approx(6.5 + 2 * 4 + 3 * 0.5)
    assert alone.reduced[1] == pytest.approx(6.5 + 2 * 4)


@given(shapes, st.sampled_from([0.0, 0.5, 2.0]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_shared_card_changes_nothing_for_messages_that_take_no_time(shape, hop, eager):
    plan = lower(breadth_first(shape, eager_backward=eager), shape)
    assert (
        replay(plan, shape, Costs(hop=hop, reduction=3, shared_card=True)).spans
        == replay(plan, shape, Costs(hop=hop, reduction=3)).spans
    )


@given(shapes, st.sampled_from([0.1, 0.4]), st.sampled_from([0.0, 3.0, 9.0]), st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_sharing_ends_for_every_runtime_and_costs_no_more_than_all_messages(shape, transfer, collective, buckets):
    plans = [(lower(breadth_first(shape), shape, resident_chunks=each), None) for each in (None, 2)]
    if shape.num_microbatches % shape.pp_size == 0:
        plans.append((aligned(lower(interleaved_1f1b(shape), shape), shape), MEGATRON))
    plans.append(([[each for each in rank if each.microbatch is not None] for rank in plans[0][0]], TORCH))
    for plan, waits in plans:
        more = () if waits is None else (waits,)
        costs = {
            "hop": 0.2,
            "transfer": transfer,
            "gather": collective / 3,
            "reduction": collective,
            "buckets": buckets,
        }
        alone, shared = (
            replay(plan, shape, Costs(1, 2, **costs, shared_card=each), *more).step_time for each in (False, True)
        )
        messages = 2 * (shape.num_stages - 1) * shape.num_microbatches
        # Each message can be held up, and hold up a collective at either end, by its own time. Where two share, one of
        # them ends sooner.
        assert alone - messages * transfer - 1e-9 <= shared <= alone + 3 * messages * transfer + 1e-9


def test_only_messages_that_leave_the_node_share_the_card():
    shape = PipelineShape(4, 2, 8)
    plan = lower(breadth_first(shape), shape)
    crossing = shape.edges_between_nodes(2)
    assert crossing == [False, True, False, True]
    costs = {"forward": 1, "backward": 2, "reduction": 16, "transfer": 0.5}
    none, some, every = (
        replay(plan, shape, Costs(**costs, shared_card=each)).reduced for each in (False, crossing, True)
    )
    assert all(a < b < c for a, b, c in zip(none, some, every, strict=True))


def test_the_edges_of_the_ring_have_their_own_latency():
    shape = PipelineShape(4, 2, 16)
    plan = lower(breadth_first(shape), shape)
    found = replay(plan, shape, Costs(hop=[0.0, 1.0, 0.0, 3.0]))
    assert found.step_time == 3 * (2 * 16 + 3) + 2 * 1.0  # the way to the last rank and back; the last edge is hidden
    short = PipelineShape(4, 2, 4)
    loop = replay(lower(breadth_first(short), short), short, Costs(hop=[0.0, 1.0, 0.0, 3.0])).step_time
    assert loop == 3 * (2 * 4 + 3) + 2 * 1.0 + 2 * 4.0  # and twice the whole ring, which nothing hides
