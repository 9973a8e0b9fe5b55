"""The buffers of messages: how many tensors a rank holds for them at a time, and receives whose sizes come late."""

from collections import deque

from .check import SEND_WINDOW
from .ir import COMPUTE, RECEIVES, Action, Op, PipelineShape, Schedule
from .lower import peer
from .simulate import simulate


def most_messages(actions: list[Action], shape: PipelineShape) -> int:
    """Return the most tensors that a rank holds for messages at a time, beside its live activations.

    actions: of the rank, from a lowered plan. A buffer counts from its receive on: that of an input until its forward
    starts, whose activation it then is, and that of a gradient until its backward ends. A result that is sent counts
    from the action that makes it until its send is waited for, SEND_WINDOW compute actions later; an output at the
    latest until its own backward.

    Most of them does not depend on the number of micro-batches, but where that exceeds the number of ranks by N, the
    first rank keeps N inputs, and the last rank N gradients, that have come while it still runs the chunk before.
    """
    received = most = 0
    sent: deque[list[Action]] = deque([[]], SEND_WINDOW)  # as in runtime/p2p.py
    for action in actions:
        stage, op, microbatch = action
        if op in RECEIVES:
            received += 1
            most = max(most, received + sum(map(len, sent)))
        if op not in COMPUTE:
            continue
        is_first, is_last = stage == 0, stage == shape.num_stages - 1
        if op is Op.F:
            received -= not is_first
            made = [] if is_last else [Action(stage, Op.F, microbatch)]
        else:
            for results in sent:
                if (output := Action(stage, Op.F, microbatch)) in results:
                    results.remove(output)
            made = [] if is_first else [action]
        sent.append(made)
        most = max(most, received + sum(map(len, sent)))
        received -= op is Op.B and not is_last
    return most


def after_sends(plan: Schedule, shape: PipelineShape) -> Schedule:
    """Move each receive behind the end of its sender, so that a rank may wait for the sizes before it posts it.

    In a simulation without hops it then stands before the first action that starts when its sender has ended: every
    wait points back in time, so no ranks wait for each other. A message is no more on its way while the receiver ends
    the action before, which costs a step about what Megatron's default waits.
    """
    timeline = simulate(plan, shape)
    ends = {span.action: span.end for spans in timeline.spans for span in spans}

    def sent_at(receive: Action) -> float:
        send = peer(receive, shape)
        assert send is not None, "a message has two ends"
        return ends[send._replace(op=Op.F if send.op is Op.SEND_F else Op.B)]

    moved: Schedule = []
    for actions, spans in zip(plan, timeline.spans):
        receives = deque(sorted((each for each in actions if each.op in RECEIVES), key=sent_at))
        starts = iter([span.start for span in spans])
        moved.append([])
        for action in actions:
            if action.op in COMPUTE:
                start = next(starts)
                while receives and sent_at(receives[0]) <= start:
                    moved[-1].append(receives.popleft())
            if action.op not in RECEIVES:
                moved[-1].append(action)
    return moved
