"""Lowering: passes that add communication to an order. List in, list out; no pass knows the runtime."""

from __future__ import annotations

from .ir import Action, Op, PipelineShape, Schedule
from .simulate import simulate

Channel = tuple[Op, int, int]  # (SEND_F or SEND_B, sending pp_rank, receiving pp_rank)
Communicator = tuple[Op, int]  # (SEND_F or SEND_B, color)


def lower(order: Schedule, shape: PipelineShape) -> Schedule:
    """The plan of a step: `order` with its sends, receives, parameter gathers and gradient reductions."""
    plan = add_send_recv(order, shape)
    if any(action.op is Op.B for actions in order for action in actions):
        # Evaluation neither reduces gradients nor gathers parameters: Megatron gathers them before it starts.
        plan = add_unshard(add_reduce_grad(plan, shape), shape)
    return plan


def peer(action: Action, shape: PipelineShape) -> Action | None:
    """The receive that belongs to the send `action`, or the send that belongs to the receive.

    None at the two ends of the model, where nothing is sent.
    """
    step = 1 if action.op in (Op.SEND_F, Op.RECV_B) else -1
    other = {Op.SEND_F: Op.RECV_F, Op.RECV_F: Op.SEND_F, Op.SEND_B: Op.RECV_B, Op.RECV_B: Op.SEND_B}[action.op]
    stage = action.stage + step
    return Action(stage, other, action.microbatch) if 0 <= stage < shape.num_stages else None


def channel(send: Action, shape: PipelineShape) -> Channel:
    """The in-order channel of a send: one kind of message, in one direction, between one pair of ranks.

    NCCL matches the sends and receives of a pair of ranks by order alone. With a channel to itself, each kind keeps the
    sender's own order, and neither kind of traffic can block the other. With 2 ranks the forward traffic of both ranks
    would share a pair, so channels are directed.
    """
    received = peer(send, shape)
    assert received is not None, f"{send} has no receiver"
    return send.op, shape.rank_of(send.stage), shape.rank_of(received.stage)


def communicator(key: Channel, pp_size: int) -> Communicator:
    """The communicator that carries a channel; it carries no other channel of either rank.

    A communicator may run all operations of a rank in one stream (torch does, where it creates NCCL communicators
    eagerly), so the channels of one rank must not share one. The ranks form a ring, and edge e joins ranks e and
    e + 1 modulo P. Edges that meet in a rank get two colors, taking turns; the last edge of an odd ring needs a third.
    One communicator per kind of message and color then holds pairs of ranks that have nothing to do with each other.
    """
    kind, source, target = key
    edge = source if kind is Op.SEND_F else target
    color = 2 if pp_size % 2 == 1 and edge == pp_size - 1 else edge % 2
    return kind, color


def add_send_recv(order: Schedule, shape: PipelineShape) -> Schedule:
    """Launch every send right after its result; post every receive before the action that runs as it is sent.

    The receive stands before the last action that the receiver starts before the sender ends, in a simulation with
    backwards twice as long as forwards. That is one action ahead of need or earlier: a message can arrive while
    the receiver computes, and a sender never waits for a receiver that is merely ahead (rank 0 gets the first
    microbatches of the next chunk while it still runs this one). The positions follow one clock, so plans cannot
    deadlock whatever the real durations are: every wait points back in time.
    """
    timeline = simulate(order, shape)
    receives: list[list[list[Action]]] = [[[] for _ in actions] for actions in order]
    starts = [[span.start for span in spans] for spans in timeline.spans]
    at = [0] * shape.pp_size  # sends are visited by time, so positions only grow
    sends = [(span.end, _send_after(span.action)) for spans in timeline.spans for span in spans]
    for end, send in sorted(sends):
        receive = peer(send, shape)
        if receive is not None:
            rank = shape.rank_of(receive.stage)
            while at[rank] + 1 < len(starts[rank]) and starts[rank][at[rank] + 1] < end:
                at[rank] += 1
            receives[rank][at[rank]].append(receive)
    plan: Schedule = []
    for rank, actions in enumerate(order):
        plan.append([])
        for position, action in enumerate(actions):
            plan[rank] += receives[rank][position] + [action]
            send = _send_after(action)
            if peer(send, shape) is not None:
                plan[rank].append(send)
    return plan


def add_reduce_grad(plan: Schedule, shape: PipelineShape) -> Schedule:
    """Reduce a chunk's gradients once, right after its last backward and the send that follows it."""
    last = Op.B, shape.num_microbatches - 1
    lowered: Schedule = []
    for actions in plan:
        lowered.append([])
        pending: int | None = None
        for action in actions:
            if pending is not None and action.op is not Op.SEND_B:
                lowered[-1].append(Action(pending, Op.REDUCE_GRAD))
                pending = None
            lowered[-1].append(action)
            if (action.op, action.microbatch) == last:
                pending = action.stage
        if pending is not None:
            lowered[-1].append(Action(pending, Op.REDUCE_GRAD))
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


def _send_after(action: Action) -> Action:
    return Action(action.stage, Op.SEND_F if action.op is Op.F else Op.SEND_B, action.microbatch)
