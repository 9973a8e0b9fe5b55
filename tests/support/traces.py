"""A recorded step, small enough to compute its numbers by hand."""

from megatron_bfpp.schedule import Action, PipelineShape
from megatron_bfpp.timeline.document import Trace
from megatron_bfpp.timeline.intervals import ACTION, DP, P2P, Interval

MS = 1_000_000


def document(waits=True):
    """PP 2, one chunk, one micro-batch; times in milliseconds, 100 in all."""
    first = [("0F0", ACTION, 0, 10), ("0SEND_F0", ACTION, 10, 10), ("0RECV_B0", ACTION, 10, 10),
             ("0B0", ACTION, 10, 90), ("0RECV_B0", P2P, 11, 60), ("0REDUCE_GRAD", ACTION, 90, 92),
             ("0REDUCE_GRAD", DP, 91, 100)]  # fmt: skip
    second = [("1RECV_F0", ACTION, 0, 0), ("1F0", ACTION, 0, 30), ("1RECV_F0", P2P, 0, 12), ("1UNSHARD", DP, 20, 22),
              ("1B0", ACTION, 30, 58), ("1SEND_B0", ACTION, 58, 58)]  # fmt: skip
    trace = Trace(2, {"schedule": "breadth-first", "waits": waits})
    ranks = [
        [Interval(Action.parse(name), kind, start * MS, end * MS) for name, kind, start, end in rank]
        for rank in (first, second)
    ]
    trace.add(20, PipelineShape(2, 1, 1), ranks, clock_error_us=[0.0, 31.0])
    return trace.document()
