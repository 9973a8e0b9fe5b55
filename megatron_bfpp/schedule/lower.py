"""Lowering: passes that add communication to an order. Lists in, lists out; no pass knows the runtime."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from .ir import Action, Op, PipelineShape, Schedule
from .sharding import add_sharding
from .simulate import Timeline, simulate

Channel = tuple[Op, int, int]  # (SEND_F or SEND_B, sending pp_rank, receiving pp_rank)
Communicator = tuple[Op, int]  # (SEND_F or SEND_B, colour of the edge)

# Where the other end of a message is: how many stages on, and its op.
_PEER = {Op.SEND_F: (1, Op.RECV_F), Op.RECV_F: (-1, Op.SEND_F), Op.SEND_B: (-1, Op.RECV_B), Op.RECV_B: (1, Op.SEND_B)}


def lower(
    order: Schedule, shape: PipelineShape, timeline: Timeline | None = None, resident_chunks: int | None = None
) -> Schedule:
    """Return the plan of a step: `order` with its sends, receives, parameter gathers and gradient reductions.

    timeline: the result of `simulate(order, shape)`, from a caller that has it; made here otherwise.
    resident_chunks: with fully sharded parameters, how many chunks of a rank may be gathered at a time; None for
        replicated ones and ZeRO-1.
    """
    plan = add_send_recv(order, shape, timeline)
    has_backwards = any(action.op is Op.B for actions in order for action in actions)
    if has_backwards:
        plan = add_reduce_grad(plan, shape)
    if resident_chunks is not None:
        return add_sharding(plan, shape, resident_chunks)
    # Evaluation gathers nothing of its own: Megatron gathers the parameters before it starts.
    return add_unshard(plan, shape) if has_backwards else plan


def peer(action: Action, shape: PipelineShape) -> Action | None:
    """Return the receive that belongs to the send `action`, or the send that belongs to the receive.

    None at the two ends of the model, where nothing is sent.
    """
    step, other = _PEER[action.op]
    stage = action.stage + step
    return Action(stage, other, action.microbatch) if 0 <= stage < shape.num_stages else None


def channel(send: Action, shape: PipelineShape) -> Channel:
    """Return the in-order channel of a send: one kind of message, in one direction, between one pair of ranks.

    NCCL matches the sends and receives of a pair of ranks by order alone. With a channel to itself, each kind keeps the
    sender's own order, and neither kind of traffic can block the other. With 2 ranks the forward traffic of both ranks
    would share a pair, so channels are directed.
    """
    received = peer(send, shape)
    assert received is not None, f"{send} has no receiver"
    return send.op, shape.rank_of(send.stage), shape.rank_of(received.stage)


def communicator(key: Channel, pp_size: int) -> Communicator:
    """Return (kind, colour): the communicator, a process group of all ranks, that carries a channel.

    The operations of a rank on one communicator may be serialized (torch does that where it initializes NCCL eagerly),
    so no two channels of a rank may share one: a receive that is posted ahead would stand in the way of later sends.
    Edge e of the ring joins ranks e and e + 1; its colour is e mod 2, and 2 for the last edge of an odd ring. Edges
    that meet in a rank thus differ in colour, and a rank has one direction of one kind of message on a communicator.
    """
    kind, source, target = key
    edge = source if kind is Op.SEND_F else target
    return kind, 2 if pp_size % 2 and edge == pp_size - 1 else edge % 2


def add_send_recv(order: Schedule, shape: PipelineShape, timeline: Timeline | None = None) -> Schedule:
    """Launch every send right after its result; post every receive before the action that runs as it is sent.

    A receive stands before the last action that the receiver starts before the sender ends, in a simulation with
    backwards twice as long as forwards. That is one action ahead of need or earlier: a message can arrive while
    the receiver computes, and on that clock no sender waits for a receiver that is merely ahead (rank 0 gets the first
    microbatches of the next chunk while it still runs this one). With other durations a send can wait, in time that
    its rank idles anyway: backwards of 1 to 3 forwards leave the step time as it is. Receives placed for shorter
    backwards too would gain nothing and hold more buffers. All positions follow one clock, so plans cannot deadlock
    whatever the real durations are: every wait points back in time.
    """
    timeline = timeline or simulate(order, shape)
    sends = [[_send_after(span.action, shape) for span in spans] for spans in timeline.spans]
    plan: Schedule = []
    for rank, spans in enumerate(timeline.spans):
        arriving: list[tuple[float, Action]] = []
        for source, op in ((rank - 1, Op.SEND_F), ((rank + 1) % shape.pp_size, Op.SEND_B)):
            sent = zip(timeline.spans[source], sends[source])
            arriving += [(span.end, send) for span, send in sent if send is not None and send.op is op]
        arriving.sort(reverse=True)  # the first to arrive is the last of the list
        actions: list[Action] = []
        for span, following, send in zip_longest(spans, spans[1:], sends[rank]):
            while arriving and (following is None or arriving[-1][0] <= following.start):
                receive = peer(arriving.pop()[1], shape)
                assert receive is not None, "a send has a receiver"
                actions.append(receive)
            actions.append(span.action)
            if send is not None:
                actions.append(send)
        plan.append(actions)
    return plan


def add_reduce_grad(plan: Schedule, shape: PipelineShape) -> Schedule:
    """Reduce a chunk's gradients once, right after its last backward and the send that follows it."""
    last = shape.num_microbatches - 1
    lowered = [list(actions) for actions in plan]
    for actions in lowered:
        for position in range(len(actions), 0, -1):
            stage, op, microbatch = actions[position - 1]
            if op is Op.B and microbatch == last:
                has_send = actions[position : position + 1] == [Action(stage, Op.SEND_B, last)]
                actions.insert(position + has_send, Action(stage, Op.REDUCE_GRAD))
    return lowered


def add_unshard(plan: Schedule, shape: PipelineShape) -> Schedule:
    """Gather a chunk's parameters while the chunk before it runs; those of the first chunk at the start."""
    lowered: Schedule = []
    for rank, actions in enumerate(plan):
        stages = shape.stages_on(rank)
        lowered.append([Action(stages[0], Op.UNSHARD)])
        for action in actions:
            following = action.stage + shape.pp_size
            if action.op is Op.F and action.microbatch == 0 and following in stages:
                lowered[rank].append(Action(following, Op.UNSHARD))
            lowered[rank].append(action)
    return lowered


def _send_after(action: Action, shape: PipelineShape) -> Action | None:
    """Return the send of the result of a forward or backward; None where the model ends."""
    send = action._replace(op=Op.SEND_F if action.op is Op.F else Op.SEND_B)
    return None if peer(send, shape) is None else send


def aligned(plan: Schedule, shape: PipelineShape) -> Schedule:
    """Move the reductions and gathers of a lowered plan to where Megatron's interleaved loop launches them by default.

    --align-grad-reduce and --align-param-gather launch them at the same time on all pipeline ranks: pp_rank r launches
    a reduction r backwards after the last of the chunk, and a gather r forwards before the first of the chunk before;
    the first two chunks are gathered at the start.

    Source: megatron.core.pipeline_parallel.schedules, forward_backward_pipelining_with_interleaving.
    """
    return [list(_aligned(actions, rank, shape)) for rank, actions in enumerate(plan)]


def _aligned(actions: list[Action], rank: int, shape: PipelineShape) -> Iterator[Action]:
    stages, last = shape.stages_on(rank), shape.num_microbatches - 1
    forwards, backwards = ([each for each in actions if each.op is op] for op in (Op.F, Op.B))
    forward = backward = 0
    pending = {each.stage for each in backwards}
    yield from (Action(stage, Op.UNSHARD) for stage in stages[:2])
    for action in actions:
        if action.op is Op.F:
            ahead = forwards[forward + rank] if forward + rank < len(forwards) else None
            forward += 1
            if ahead is not None and ahead.microbatch == 0 and stages[0] < ahead.stage < stages[-1]:
                yield Action(ahead.stage + shape.pp_size, Op.UNSHARD)
        if action.op not in (Op.UNSHARD, Op.REDUCE_GRAD):
            yield action
        if action.op is Op.B:
            behind = backwards[backward - rank] if backward >= rank else None
            backward += 1
            if behind is not None and behind.microbatch == last:
                pending.discard(behind.stage)
                yield Action(behind.stage, Op.REDUCE_GRAD)
    yield from (Action(stage, Op.REDUCE_GRAD) for stage in sorted(pending))
