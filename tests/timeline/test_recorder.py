"""What the recorder notes, when it asks a clock, and how notes become the lanes of a trace."""

import time
from contextlib import nullcontext
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch

from megatron_bfpp.runtime import clocks
from megatron_bfpp.runtime.clocks import CudaClock, HostClock, clock_of
from megatron_bfpp.runtime.p2p import Messages, _Sent
from megatron_bfpp.schedule import Action, Op, PipelineShape, breadth_first, lower
from megatron_bfpp.timeline.document import COMPUTE_LANE, RECEIVING, SENDING, WAITING, Trace
from megatron_bfpp.timeline.intervals import ACTION, DP, P2P, Interval
from megatron_bfpp.timeline.recorder import Recorder


def interval(name, *rest):
    return Interval(Action.parse(name), *rest)


class Ticks:
    """A clock on which every mark is one later."""

    def __init__(self):
        self.mark = count().__next__

    def begin(self):
        return 0

    def nanoseconds(self, marks):
        return marks


def test_an_action_and_what_it_waits_for_are_noted_apart_in_the_order_of_their_beginning():
    recorder = Recorder(Ticks())
    recorder.begin()
    with recorder.span(Action(2, Op.F, 0)):
        with recorder.waiting(Action(2, Op.RECV_F, 0)):
            pass
        with recorder.waiting_for_replicas(Action(2, Op.UNSHARD)), recorder.waiting_for_replicas(Action(0, Op.UNSHARD)):
            pass  # the inner wait is a part of the outer one
    assert recorder.take() == [
        interval("2F0", ACTION, 0, 6), interval("2RECV_F0", P2P, 1, 2), interval("2UNSHARD", DP, 3, 5),
    ]  # fmt: skip
    assert recorder.take() == []


def test_a_wait_that_fails_is_over():
    recorder = Recorder(Ticks())
    with pytest.raises(RuntimeError, match="lost"), recorder.waiting(Action(2, Op.RECV_F, 0)):
        raise RuntimeError("lost")
    with recorder.waiting(Action(2, Op.RECV_F, 1)):
        pass
    assert [str(each.action) for each in recorder.take()] == ["2RECV_F0", "2RECV_F1"]


def test_the_hosts_clock_is_taken_on_a_cpu():
    assert isinstance(clock_of(torch.device("cpu")), HostClock)
    assert isinstance(clock_of(torch.device("cuda")), CudaClock)
    recorder = Recorder(HostClock())
    before = time.perf_counter_ns()
    with recorder.span(Action(0, Op.F, 0)):
        time.sleep(0.01)
    (interval,) = recorder.take()
    assert before <= interval.start and interval.end - interval.start >= 10_000_000


def test_on_cuda_events_are_recorded_without_a_wait_within_the_step_and_used_again_by_the_next(monkeypatch):
    made, waits, ticks = [], [], count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            self.at_ms = next(ticks)

        def synchronize(self):
            waits.append("event")

        def elapsed_time(self, other):
            return other.at_ms - self.at_ms

    cuda = SimpleNamespace(Event=Event, synchronize=lambda: waits.append("device"))
    monkeypatch.setattr(clocks, "torch", SimpleNamespace(cuda=cuda))
    recorder = Recorder(CudaClock())
    for _ in range(2):
        error = recorder.begin()
        before, waits[:] = time.perf_counter_ns(), []
        with recorder.span(Action(0, Op.F, 0)):
            pass
        assert waits == [], "the step waited for the device"
        (interval,) = recorder.take()
        assert waits == ["device"] and error >= 0
        assert interval.end - interval.start == 1_000_000  # one tick, a millisecond
        assert abs(interval.start - before) < 60_000_000_000
    assert len(made) == 3


def test_messages_wait_within_the_context_that_they_are_given():
    waited = []

    def waiting(action):
        waited.append(action)
        return nullcontext()

    groups = SimpleNamespace(routes=lambda shape: {})
    messages = Messages(groups, PipelineShape(2, 2, 2), (1,), torch.float32, torch.device("cpu"), waiting=waiting)
    received, sent = Action(2, Op.RECV_F, 0), Action(2, Op.SEND_F, 0)
    done = []
    handle = SimpleNamespace(wait=lambda: done.append(True))
    messages._receives[received] = SimpleNamespace(action=received, handle=handle, buffer="buffer", header=None)
    assert messages.receive(received) == "buffer"
    messages._sent[-1].append(_Sent(sent, handle, None, None, None))
    messages.assert_finished()
    assert waited == [received, sent] and len(done) == 2


def step(shape, order, durations):
    """Intervals of every rank as an executor would note them, on a clock of one tick per launch."""
    ranks = []
    for actions in lower(order, shape):
        now, intervals = 0, []
        for action in actions:
            start, waits = now, []
            if action.op is Op.F and action.stage > 0:
                waits = [Interval(Action(action.stage, Op.RECV_F, action.microbatch), P2P, now + 1, now + 6)]
                now += 6
            now += durations.get(action.op, 1)
            intervals += [Interval(action, ACTION, start, now), *waits]
        ranks.append(intervals)
    return ranks


def test_a_compute_action_begins_where_its_wait_for_a_message_ends_and_is_not_busy_while_it_waits_for_a_gather():
    trace = Trace(2, {})
    intervals = [
        interval("0F0", ACTION, 1000, 9000),
        interval("0SEND_F0", P2P, 1100, 2000),
        interval("0UNSHARD", DP, 3000, 4500),
    ]
    trace.add(7, PipelineShape(2, 1, 1), [intervals, []])
    compute = [event for event in trace.document()["traceEvents"] if event.get("cat") == "compute"]
    assert [(event["ts"], event["dur"], event["args"]) for event in compute] == [
        (1.0, 7.0, {"step": 7, "busy_us": 5.5})
    ]


@pytest.mark.parametrize("sizes", [(2, 2, 3), (4, 2, 8), (3, 3, 2)])
def test_a_trace_is_sorted_its_lanes_do_not_overlap_and_every_arrow_has_two_ends(sizes):
    shape = PipelineShape(*sizes)
    trace, order = Trace(shape.pp_size, {}), breadth_first(shape)
    for number in (5, 6):
        trace.add(number, shape, step(shape, order, {Op.F: 10, Op.B: 20}))
    events = [event for event in trace.document()["traceEvents"] if event["ph"] != "M"]
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    messages = 2 * (shape.num_stages - 1) * shape.num_microbatches * 2  # two steps
    starts, ends = ({event["id"]: event for event in events if event["ph"] == phase} for phase in "sf")
    assert starts.keys() == ends.keys() and len(starts) == messages
    assert {event["tid"] for event in starts.values()} == {SENDING}
    assert {event["tid"] for event in ends.values()} == {RECEIVING}
    for rank in range(shape.pp_size):
        for lane in (COMPUTE_LANE, WAITING, SENDING, RECEIVING):
            found = [event for event in events if (event["ph"], event["pid"], event["tid"]) == ("X", rank, lane)]
            spans = [(each["ts"], each["ts"] + each["dur"]) for each in found if each["args"]["step"] == 5]
            assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(spans)), (rank, lane)
