"""Messages give up what they hold as soon as they may, also where a handle holds its tensors, as on CUDA."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_bfpp.runtime.activity import Activity
from megatron_bfpp.runtime.channels import Route
from megatron_bfpp.runtime.p2p import Messages
from megatron_bfpp.schedule import Action, Op, PipelineShape, breadth_first, lower

PP_RANK = 1


class Handle:
    """Of NCCL: holds its tensors, and its wait() returns before the message has arrived."""

    def __init__(self, tensor):
        self.tensor = tensor

    def wait(self):
        pass


class Event:
    """Of a device that has done nothing yet but the first `reached` events."""

    made, reached = 0, 0

    def record(self):
        self.number = Event.made
        Event.made += 1

    def query(self):
        return self.number < Event.reached


@pytest.fixture
def messages(monkeypatch):
    shape = PipelineShape(2, 2, 8)
    routes = {(stage, op): Route("group", 0) for stage in shape.stages_on(PP_RANK) for op in Op}
    monkeypatch.setattr(dist, "isend", lambda tensor, *_, **__: Handle(tensor))
    monkeypatch.setattr(dist, "irecv", lambda tensor, *_, **__: Handle(tensor))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", 0)
    monkeypatch.setattr(Event, "reached", 0)
    groups = SimpleNamespace(routes=lambda _: routes, ranks=[0, 1], pp_rank=PP_RANK)
    made = Messages(groups, shape, (4,), torch.float32, torch.device("cpu"), activity=Activity())
    made._is_cuda = True
    return made


def test_no_message_outlives_the_actions_that_need_it_on_a_device(messages):
    # With the handle kept for the watchdog, all 2 x 15 x 8 messages of the step would live to its end.
    alive = weakref.WeakSet()
    shape, most = messages.shape, 0
    for action in lower(breadth_first(shape), shape)[PP_RANK]:
        if action.op in (Op.F, Op.B):
            messages.before_compute()
            key = action.stage, Op.RECV_F if action.op is Op.F else Op.RECV_B, action.microbatch
            if key in messages._receives:
                alive.add(messages.receive(key))
        elif action.op in (Op.RECV_F, Op.RECV_B):
            messages.post_receive(action)
        elif action.op in (Op.SEND_F, Op.SEND_B):
            tensor = torch.zeros(4)
            alive.add(tensor)
            messages.send(action, tensor)
            del tensor
        most = max(most, len(alive))
    messages.assert_finished()
    assert not alive, "a message lives to the end of the step"
    assert 0 < most <= 4  # two windows of sends


def test_the_watchdog_names_the_first_receive_that_the_device_has_not_reached_and_forgets_the_others(messages):
    receives = [Action(1, Op.RECV_F, microbatch) for microbatch in range(4)]
    messages.activity.begin_step("step 1", messages.shape, [0, 1], PP_RANK)
    for number, action in enumerate(receives):
        Event.reached = max(0, number - 1)
        messages.post_receive(action)
        messages.receive(action)
    assert messages.activity.status(1, "a").waiting == "1RECV_F2"
    assert [action for action, _ in messages.activity._launched] == receives[2:]
