"""Lowering: passes that add communication to an order. Lists in, lists out; no pass knows the runtime."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator

from .dry_run import posted_too_early
from .ir import BACKWARDS, COMPUTE, RECEIVES, Action, Op, PipelineShape, Schedule, peer
from .sharding import add_sharding
from .simulate import Key, Span, Timeline, dependency, result, simulate

# The latency of a message, in forwards of one micro-batch through one chunk, for which receives are placed. Messages
# of up to 1/4 of a forward then lose no time on one hardware queue; on queues of their own longer ones do not either.
# A plan for longer ones keeps rank P-1 waiting for rank 0 where messages are short: from P h > 2 on, by 0.9% at P 8 and
# h 0.5.
DEFAULT_HOP = 0.25

# The time of an I, in that of a forward or a W, for which receives are placed where backwards are split. A gradient
# that goes around the ring comes P-1 I's and messages after the last rank made its own. With 1, a recomputed forward in
# the I (i = 2) makes it a whole micro-batch late at P 8, and on one hardware queue the receive of the next stands in
# its way: up to 3.3% of a step are lost. With 5/4 it is at most 0.9% for i from 1 to 2 with messages of 1/4.
INPUTS = 1.25


def lower(
    order: Schedule, shape: PipelineShape, resident_chunks: int | None = None, hop: float | None = DEFAULT_HOP
) -> Schedule:
    """Return the plan of a step: `order` with its sends, receives, parameter gathers and gradient reductions.

    resident_chunks: with fully sharded parameters, how many chunks of a rank may be gathered at a time; None for
        replicated ones and ZeRO-1.
    hop: of the messages for which receives are placed, see `add_send_recv`.
    """
    plan = add_send_recv(order, shape, hop)
    has_backwards = any(action.op in BACKWARDS for actions in order for action in actions)
    if has_backwards:
        plan = add_reduce_grad(plan, shape)
    if resident_chunks is not None:
        return add_sharding(plan, shape, resident_chunks)
    # Evaluation gathers nothing of its own: Megatron gathers the parameters before it starts.
    return add_unshard(plan, shape) if has_backwards else plan


def add_send_recv(order: Schedule, shape: PipelineShape, hop: float | None = DEFAULT_HOP) -> Schedule:
    """Launch every send right after its result; post every receive before the action that runs as it arrives.

    hop: the latency of a message, in forwards of one micro-batch through one chunk. A receive stands before the last
        action that the receiver starts before the message is there, in a simulation with backwards twice as long as
        forwards (where they are split, a W takes a forward and an I takes INPUTS). That is one action ahead of need or
        earlier, so that a message can arrive while the receiver computes.
        Not earlier: on one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) a receive that stands behind another on its
        communicator blocks all later computation. Not later: then the sender waits.
        None: nothing is posted ahead. A receive stands before the first action that starts once its message has been
        sent. All waits then point back in time on that clock, for the device as for a message: nothing hangs even if
        all ranks wait for their whole device before and after every forward and backward. Messages are not hidden.

    Whatever hop says, a receive stands behind the last own action on which its sender depends, by data and by the order
    of the ranks. Else a wait for the whole device in between (cudaFree, the first load of a kernel, an allocator that
    tries again) would wait for a message that cannot be sent before it ends. Some orders in groups of a few
    micro-batches have no such places for a long hop: they get those for DEFAULT_HOP, and the line at start says so.
    """
    plan, is_settled = _settled(_placed(order, shape, hop), shape)
    return plan if is_settled or hop is None else _settled(_placed(order, shape, DEFAULT_HOP), shape)[0]


def _placed(order: Schedule, shape: PipelineShape, hop: float | None) -> Schedule:
    """Return `order` with its sends and receives, before the waits of messages for each other are looked at."""
    is_split = any(action.op is Op.I for actions in order for action in actions)
    timeline = simulate(order, shape, 1.0, 1.0 + INPUTS if is_split else 2.0, hop or 0.0, weights=1.0)
    places = {
        result(span.action): (rank, at) for rank, spans in enumerate(timeline.spans) for at, span in enumerate(spans)
    }
    plan: Schedule = []
    for rank, spans in enumerate(timeline.spans):
        starts = [span.start for span in spans]
        receives: dict[int, list[tuple[float, Action]]] = defaultdict(list)  # position in the order -> those before it
        for source, op in ((rank - 1, Op.SEND_F), ((rank + 1) % shape.pp_size, Op.SEND_B)):
            for span in timeline.spans[source]:
                send = _send_after(span.action, shape)
                if send is not None and send.op is op:
                    receive = peer(send, shape)
                    assert receive is not None, "a send has a receiver"
                    following = bisect_left(starts, span.end + (hop or 0.0))
                    place = following if hop is None else max(following - 1, 0)
                    needed = 1 + _last_cause(span, rank, starts[place], timeline, places)
                    receives[max(place, needed)].append((span.end, receive))
        actions: list[Action] = []
        for position, span in enumerate(spans):
            actions += [receive for _, receive in sorted(receives[position])]
            actions.append(span.action)
            if hop is None:  # what has been sent before now is asked for before the next send
                coming = sorted(receives[position + 1])
                actions += [receive for sent, receive in coming if sent < span.end]
                receives[position + 1] = [each for each in coming if each[0] >= span.end]
            send = _send_after(span.action, shape)
            if send is not None:
                actions.append(send)
        plan.append(actions)
    return plan


def _last_cause(span: Span, pp_rank: int, since: float, timeline: Timeline, places: dict[Key, tuple[int, int]]) -> int:
    """Return the last action of a rank, by its position, that starts at `since` or later and that `span` depends on.

    -1 if there is none. It goes back from `span`, as far as `since`: mostly not at all.
    """
    last, coming, seen = -1, [span], {span.action}
    while coming:
        each = coming.pop()
        rank, position = places[result(each.action)]
        if rank == pp_rank:
            last = max(last, position)
            continue
        need = dependency(each.action, timeline.shape.num_stages - 1)
        causes = [timeline.spans[rank][position - 1]] if position else []
        if need is not None:
            place = places[need]
            causes.append(timeline.spans[place[0]][place[1]])
        for cause in causes:
            if cause.start >= since and cause.action not in seen:
                seen.add(cause.action)
                coming.append(cause)
    return last


def _settled(plan: Schedule, shape: PipelineShape) -> tuple[Schedule, bool]:
    """Move receives behind the own actions on which their senders depend by the waits of messages too.

    Some plans with groups of a few micro-batches need it: there a sender waits for an older send of its own. Return
    whether no message is too early then.
    """
    while early := posted_too_early(plan, shape):
        if not any(action.op in RECEIVES for action in early):
            return plan, False
        settled: Schedule = []
        for actions in plan:
            behind: dict[int, list[Action]] = defaultdict(list)
            moved = {action for action in actions if action in early and action.op in RECEIVES}
            for action in actions:
                if action in moved:
                    behind[early[action]].append(action)
            settled.append([])
            for position, action in enumerate(actions):
                settled[-1] += ([] if action in moved else [action]) + behind[position]
        plan = settled
    return plan, True


def add_reduce_grad(plan: Schedule, shape: PipelineShape) -> Schedule:
    """Reduce a chunk's gradients once, right after its last B or W and the send that follows it."""
    last = shape.num_microbatches - 1
    lowered = [list(actions) for actions in plan]
    for actions in lowered:
        for position in range(len(actions), 0, -1):
            stage, op, microbatch = actions[position - 1]
            if op in (Op.B, Op.W) and microbatch == last:
                has_send = actions[position : position + 1] == [Action(stage, Op.SEND_B, last)]
                actions.insert(position + has_send, Action(stage, Op.REDUCE_GRAD))
    return lowered


def add_unshard(plan: Schedule, shape: PipelineShape) -> Schedule:
    """Gather a chunk's parameters while the chunk before it runs; those of the first chunk at the start.

    Those of the second chunk behind the first forward of several: on one hardware queue its gather holds back what
    comes behind it until the first chunk has been gathered in all its buckets, and that forward needs the first alone.
    """
    return [list(_unsharded(actions, shape.stages_on(rank))) for rank, actions in enumerate(plan)]


def _unsharded(actions: list[Action], stages: range) -> Iterator[Action]:
    yield Action(stages[0], Op.UNSHARD)
    second: Action | None = None
    for action in actions:
        if second is not None and action.op in COMPUTE:
            yield second
            second = None
        if action.op is Op.F and action.microbatch == 0 and action.stage < stages[-1]:
            gather = Action(action.stage + stages.step, Op.UNSHARD)
            if action.stage == stages[0] and Action(action.stage, Op.F, 1) in actions:
                second = gather
            else:
                yield gather
        yield action


def _send_after(action: Action, shape: PipelineShape) -> Action | None:
    """Return the send of the result of a compute action; None for a W, and where the model ends."""
    if action.op is Op.W:
        return None
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
    forwards, backwards = ([each for each in actions if each.op in ops] for ops in ({Op.F}, {Op.B, Op.W}))
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
        if action.op in (Op.B, Op.W):
            behind = backwards[backward - rank] if backward >= rank else None
            backward += 1
            if behind is not None and behind.microbatch == last:
                pending.discard(behind.stage)
                yield Action(behind.stage, Op.REDUCE_GRAD)
    yield from (Action(stage, Op.REDUCE_GRAD) for stage in sorted(pending))
