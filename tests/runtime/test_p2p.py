"""Messages give up what they hold as soon as they may, also where a handle holds its tensors, as on CUDA."""

import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_bfpp.integration.flags.settings import Settings
from megatron_bfpp.runtime import headers
from megatron_bfpp.runtime.activity import Activity
from megatron_bfpp.runtime.channels import Route
from megatron_bfpp.runtime.data_parallel import DataParallel
from megatron_bfpp.runtime.executor import Executor
from megatron_bfpp.runtime.p2p import MessageMismatchError, Messages, PeerLostError
from megatron_bfpp.schedule import Action, Op, PipelineShape, breadth_first, forward_only, lower
from megatron_bfpp.schedule.lower import peer
from megatron_bfpp.schedule.orders import weight_lags
from megatron_bfpp.schedule.plan import most_messages

PP_RANK = 1
META = torch.device("meta")  # stands for a device that the host must not read from


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
    """Return what makes the messages of a shape."""
    monkeypatch.setattr(dist, "isend", lambda tensor, *_, **__: Handle(tensor))
    monkeypatch.setattr(dist, "irecv", lambda tensor, *_, **__: Handle(tensor))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", 0)
    monkeypatch.setattr(Event, "reached", 0)

    def make(shape, pp_rank=PP_RANK, device="cpu", **more):
        routes = {(stage, op): Route("group", 0) for stage in shape.stages_on(pp_rank) for op in Op}
        groups = SimpleNamespace(routes=lambda _: routes, ranks=[0, 1], pp_rank=pp_rank)
        made = Messages(groups, shape, (4, 1, 2), torch.float32, torch.device(device), activity=Activity(), **more)
        made._is_cuda = True
        return made

    return make


class Compute:
    """Knows the tensors of messages that are alive beside the activations, and the most of them."""

    def __init__(self, messages):
        self.alive, self.most = set(), 0  # identities
        self.with_loss = messages.shape.num_stages - 1 in messages.shape.stages_on(messages.groups.pp_rank)
        self.last_chunk = messages.shape.num_chunks - 1
        post = messages.post_receive

        def posting(action):
            post(action)
            self.count(messages._receives[action].buffer)

        messages.post_receive = posting

    def forward(self, chunk, microbatch, received):
        if received is not None:
            self.alive.discard(id(received))  # an activation from here on
        output = torch.zeros(4, 1, 2) if received is None else received + 1
        return output if self.with_loss and chunk == self.last_chunk else self.count(output)

    def backward(self, received, output, grad):
        self.alive.discard(id(output))  # given up by its send, as the framework's backward expects
        return None if received is None else self.count(torch.zeros(4, 1, 2))

    def input_gradient(self, chunk, microbatch, received, output, grad):
        return self.backward(received, output, grad)

    def weight_gradients(self, chunk, microbatch):
        pass

    def count(self, tensor):
        self.alive.add(id(tensor))
        weakref.finalize(tensor, self.alive.discard, id(tensor))
        self.most = max(self.most, len(self.alive))
        return tensor

    def release(self, output):
        self.alive.discard(id(output))


def most_alive(shape, order, make_messages):
    """Run every rank; return the most tensors of messages alive in each, as counted and as the plan says."""
    counted, planned = [], []
    is_evaluation = all(action.op is Op.F for actions in order for action in actions)
    for pp_rank, actions in enumerate(lower(order, shape)):
        messages = make_messages(shape, pp_rank)
        compute = Compute(messages)
        gates = DataParallel(None, None, None, [torch.nn.Identity()] * shape.num_chunks)
        with gates:
            Executor(shape, compute, messages, gates, is_evaluation).run(actions)
        assert not compute.alive, "a message outlives the step"
        counted.append(compute.most)
        planned.append(most_messages(actions, shape))
    return counted, planned


@pytest.mark.parametrize("sizes", [(2, 1, 3), (2, 2, 1), (2, 2, 8), (3, 2, 7), (4, 1, 9), (4, 2, 8), (4, 3, 3)])
def test_no_more_messages_are_alive_than_the_plan_says(sizes, messages):
    shape = PipelineShape(*sizes)
    split = breadth_first(shape, weight_lag=weight_lags(shape))
    for order in (breadth_first(shape), breadth_first(shape, eager_backward=False), split, forward_only(shape)):
        counted, planned = most_alive(shape, order, messages)
        assert counted == planned


@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (3, 3)])
def test_only_the_inputs_and_gradients_that_come_before_their_chunk_are_more_with_more_micro_batches(sizes, messages):
    size, chunks = sizes
    most = []
    for microbatches in (2 * size, 3 * size, 5 * size + 1):
        shape = PipelineShape(size, chunks, microbatches)
        counted, _ = most_alive(shape, breadth_first(shape), messages)
        early = microbatches - size
        most.append([counted[0] - early, *counted[1:-1], counted[-1] - early])
    assert most[0] == most[1] == most[2] and max(most[0]) <= 6


def test_the_watchdog_names_the_first_receive_that_the_device_has_not_reached_and_forgets_the_others(messages):
    receives = [Action(1, Op.RECV_F, microbatch) for microbatch in range(4)]
    made = messages(PipelineShape(2, 2, 8))
    made.activity.begin_step("step 1", made.shape, [0, 1], PP_RANK)
    for number, action in enumerate(receives):
        Event.reached = max(0, number - 1)
        made.post_receive(action)
        made.receive(action)
    assert made.activity.status(1, "a").waiting == "1RECV_F2"
    assert [action for action, _ in made.activity._launched] == receives[2:]


@pytest.fixture
def wire(monkeypatch):
    """Headers on their way to this rank, and what it does on the host: "read" a header, "ask" for a tensor."""

    class Header(Handle):
        def wait(self):
            done.append("read")
            if not arriving:
                raise RuntimeError("[a.cc:1] Connection closed by peer [::1]:1. This is advice")
            self.tensor.copy_(arriving.popleft())

    def irecv(tensor, source, group, tag=None):
        if group == "gloo":
            assert tensor.device.type == "cpu" and tag == 0
            return Header(tensor)
        done.append("ask")
        return Handle(tensor)

    arriving, done = deque(), []
    monkeypatch.setattr(dist, "irecv", irecv)
    return SimpleNamespace(arriving=arriving, done=done)


@pytest.mark.parametrize("variable, order", [(False, ["ask", "read"]), (True, ["read", "ask"])])
def test_a_header_is_read_on_the_host_before_its_tensor_is_used_and_before_it_is_asked_for_if_its_size_is_open(
    messages, wire, variable, order
):
    made = messages(PipelineShape(2, 2, 8), device="meta", header_group="gloo", variable_shapes=variable)
    sizes = (3, 1, 2) if variable else (4, 1, 2)
    wire.arriving.append(headers.write(Action(0, Op.SEND_F, 5), torch.empty(sizes, device=META)))
    made.post_receive(Action(1, Op.RECV_F, 5))
    received = made.receive(Action(1, Op.RECV_F, 5))
    assert wire.done == order and received.shape == sizes and received.device == META


@pytest.mark.parametrize("variable", [False, True])
def test_another_message_and_a_lost_rank_are_named(messages, wire, variable):
    made = messages(PipelineShape(2, 2, 8), header_group="gloo", variable_shapes=variable)

    def get(microbatch):
        made.post_receive(Action(1, Op.RECV_F, microbatch))
        made.receive(Action(1, Op.RECV_F, microbatch))

    wire.arriving.append(headers.write(Action(0, Op.SEND_F, 6), torch.empty(4, 1, 2)))
    expected = (
        r"waits for 0SEND_F5 of \(4, 1, 2\) float32 \(1RECV_F5 here\), but pp_rank 0 \(rank 0\) has sent 0SEND_F6"
    )
    with pytest.raises(MessageMismatchError, match=expected):
        get(5)
    with pytest.raises(
        PeerLostError, match=r"1RECV_F7 .* received from pp_rank 0 \(rank 0\): Connection closed by peer"
    ):
        get(7)
    assert made.activity.status(1, "a").waiting == "1RECV_F7"  # the watchdog sees the wait of the host


def test_a_header_is_kept_until_its_send_is_given_up(messages):
    made = messages(PipelineShape(2, 2, 8), device="meta", header_group="gloo")
    made.send(Action(1, Op.SEND_F, 0), torch.empty(4, 1, 2, device=META))
    ((sent,),) = made._sent
    assert headers.read(sent.header.numbers).send == Action(1, Op.SEND_F, 0)
    assert sent.header.handle.tensor is sent.header.numbers


@pytest.mark.parametrize("size, chunks", [(2, 1), (2, 4), (3, 2), (4, 3), (5, 2), (8, 2)])
def test_ranks_that_wait_for_sizes_where_they_post_a_receive_all_come_to_the_end(size, chunks):
    for microbatches in (1, 2, size, 2 * size + 1):
        shape = PipelineShape(size, chunks, microbatches)
        orders = [breadth_first(shape, eager_backward=eager) for eager in (True, False)]
        for order in [*orders, forward_only(shape)]:
            assert ends(lower(order, shape, hop=None), shape)
        assert ends(Settings().plan_of(shape, is_ahead=False).actions, shape)


def test_where_receives_are_posted_ahead_the_same_waits_would_stop_the_step():
    shape = PipelineShape(2, 1, 4)
    assert not ends(Settings().plan_of(shape).actions, shape)


def ends(plan, shape):
    """Whether all ranks come to their end if each stops at a receive until its sender has launched the send."""
    rest, sent, moved = [deque(actions) for actions in plan], set(), True
    while moved:
        moved = False
        for actions in rest:
            while actions and (actions[0].op not in (Op.RECV_F, Op.RECV_B) or peer(actions[0], shape) in sent):
                sent.add(actions.popleft())
                moved = True
    return not any(rest)
