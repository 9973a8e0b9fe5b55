"""The executor on one rank at a time: what it holds in memory, what it calls in which order, what an error says."""

import weakref
from contextlib import nullcontext

import pytest

from megatron_bfpp.schedule import Action, Op, PipelineShape, breadth_first, forward_only, lower, simulate
from megatron_bfpp.schedule.orders import weight_lags

torch = pytest.importorskip("torch")

from megatron_bfpp.runtime.data_parallel import DataParallel  # noqa: E402
from megatron_bfpp.runtime.executor import Executor  # noqa: E402

SHAPES = [(2, 1, 3), (2, 2, 2), (2, 4, 5), (3, 2, 4), (4, 2, 8), (4, 3, 3), (4, 4, 1), (8, 2, 16)]


class Stage(torch.autograd.Function):
    """Adds one, and keeps an activation for its backward."""

    @staticmethod
    def forward(ctx, received, activation):
        ctx.activation = activation
        return received + 1

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Compute:
    """Counts the activations that are alive, as the memory would: by what the graphs still hold."""

    def __init__(self, fails_at=None):
        self.alive, self.owed = weakref.WeakSet(), {}
        self.peak, self.released, self.fails_at = 0, 0, fails_at

    def forward(self, chunk, microbatch, received):
        if (chunk, microbatch) == self.fails_at:
            raise RuntimeError("no memory")
        activation = torch.zeros(1)
        self.alive.add(activation)
        self.peak = max(self.peak, len(self.alive))
        return Stage.apply(torch.ones(1, requires_grad=True) if received is None else received, activation)

    def backward(self, received, output, grad):
        output.backward(grad)
        return None if received is None else received.grad

    def input_gradient(self, chunk, microbatch, received, output, grad):
        self.owed[chunk, microbatch] = output.grad_fn.activation  # what a weight's gradient needs
        return self.backward(received, output, grad)

    def weight_gradients(self, chunk, microbatch):
        del self.owed[chunk, microbatch]

    def release(self, output):
        self.released += 1


class Messages:
    """Everything arrives at once; what was sent is given up at once. Records which waits the executor asked for."""

    def __init__(self):
        self.posted, self.sent, self.computes = [], [], 0

    def post_receive(self, action):
        self.posted.append(action)

    def receive(self, action):
        self.posted.remove(action)
        return torch.ones(1, requires_grad=action[1] is Op.RECV_F)

    def send(self, action, tensor, release=None):
        self.sent.append(action)
        if release is not None:
            release(tensor)

    def before_compute(self):
        self.computes += 1

    def finish_send(self, action):
        assert action in self.sent

    def assert_finished(self):
        assert not self.posted


def execute(shape, pp_rank, order, compute, is_evaluation=False, **more):
    messages = Messages()
    gates = DataParallel(None, None, None, [torch.nn.Identity()] * shape.num_chunks)
    with gates:
        Executor(shape, compute, messages, gates, is_evaluation, **more).run(lower(order, shape)[pp_rank])
    return messages


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("eager", [True, False])
def test_the_most_live_activations_are_those_of_the_formula(sizes, eager):
    shape = PipelineShape(*sizes)
    size, chunks, microbatches = sizes
    for rank in range(size):
        compute = Compute()
        execute(shape, rank, breadth_first(shape, eager_backward=eager), compute)
        eager_peak = min(microbatches * chunks, (chunks - 1) * microbatches + 2 * (size - rank - 1) + 1)
        assert compute.peak == (eager_peak if eager else microbatches * chunks)
        assert len(compute.alive) == 0, "the step is over and something still holds an activation"


@pytest.mark.parametrize("sizes", SHAPES)
def test_of_split_backwards_no_more_is_alive_than_the_plan_says(sizes):
    shape = PipelineShape(*sizes)
    order = breadth_first(shape, weight_lag=weight_lags(shape))
    planned = simulate(order, shape).peak_live_activations()
    for rank in range(shape.pp_size):
        compute = Compute()
        execute(shape, rank, order, compute)
        assert compute.peak == planned[rank] and not compute.owed and len(compute.alive) == 0


def test_an_evaluation_keeps_one_activation_at_a_time():
    shape = PipelineShape(4, 2, 6)
    for rank in range(4):
        compute = Compute()
        messages = execute(shape, rank, forward_only(shape), compute, is_evaluation=True)
        assert messages.computes == 12
        assert compute.peak <= 2  # the output before is given up while the next one is made


def test_every_sent_output_is_released_once():
    shape = PipelineShape(3, 2, 4)
    for rank in range(3):
        compute = Compute()
        execute(shape, rank, breadth_first(shape), compute)
        assert compute.released == 4 * (2 if rank < 2 else 1)  # the last stage sends nothing


def test_an_error_names_the_rank_and_the_action_and_leaves_no_no_sync_entered():
    shape, entered = PipelineShape(2, 2, 3), []

    class NoSync(nullcontext):
        def __enter__(self):
            entered.append(self)

        def __exit__(self, *error):
            entered.remove(self)

    gates = DataParallel([NoSync, NoSync], None, None, [torch.nn.Identity()] * 2)
    with pytest.raises(RuntimeError, match="no memory") as error, gates:
        assert len(entered) == 2
        Executor(shape, Compute(fails_at=(1, 1)), Messages(), gates).run(lower(breadth_first(shape), shape)[0])
    assert error.value.__notes__ == ["megatron_bfpp: pp_rank 0 was running 2F1"]
    assert entered == []


def test_a_span_is_opened_around_every_action_and_named_after_it():
    shape, seen = PipelineShape(2, 2, 2), []

    def span(action):
        seen.append(action)
        return nullcontext()

    plan = lower(breadth_first(shape), shape)[1]
    execute(shape, 1, breadth_first(shape), Compute(), span=span)
    assert seen == plan and Action(3, Op.F, 0) in seen


@pytest.mark.parametrize("explicit", [True, False])
def test_a_chunk_is_reduced_once_after_or_during_its_last_backward_and_gathered_before_its_first_forward(explicit):
    shape, log = PipelineShape(2, 2, 3), []

    class Logging(Compute):
        def forward(self, chunk, microbatch, received):
            log.append(f"F{chunk}.{microbatch}")
            return super().forward(chunk, microbatch, received)

        def backward(self, received, output, grad):
            log.append("B")
            return super().backward(received, output, grad)

    def no_sync(chunk):
        class Context(nullcontext):
            def __exit__(self, *error):
                log.append(f"open{chunk}")

        return Context

    def launch(what, chunk):
        return lambda parameters: log.append(f"{what}{chunk}")

    gates = DataParallel(
        [no_sync(0), no_sync(1)],
        [launch("reduce", 0), launch("reduce", 1)] if explicit else None,
        [launch("gather", 0), launch("gather", 1)],
        [torch.nn.Identity()] * 2,
    )
    with gates:
        Executor(shape, Logging(), Messages(), gates).run(lower(breadth_first(shape, eager_backward=False), shape)[0])
    reduced = {True: "F1.2 B B B open1 reduce1 B B B open0 reduce0", False: "F1.2 B B open1 B B B open0 B"}[explicit]
    assert " ".join(log) == "gather0 F0.0 gather1 F0.1 F0.2 F1.0 F1.1 " + reduced
