"""What an I owes its W pays: once, in autograd's order and sums, and an older one while an I waits."""

from types import SimpleNamespace

import pytest

from megatron_bfpp.schedule import PipelineShape, breadth_first, lower
from megatron_bfpp.schedule.formats import from_text

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from megatron_bfpp.runtime import fully_sharded  # noqa: E402
from megatron_bfpp.runtime.weight_gradients import OwedGradients, covers  # noqa: E402


class Gradient:
    def __init__(self, value, log, name):
        self.value, self.log, self.name = value, log, name

    def prepare(self):
        self.log.append(f"prepare {self.name}")

    def compute(self):
        self.log.append(f"compute {self.name}")
        return self.value


class Scale(torch.autograd.Function):
    """x * weight, whose backward owes the weight's gradient if it can."""

    @staticmethod
    def forward(ctx, x, weight, owed):
        ctx.save_for_backward(x, weight)
        ctx.owed = owed
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        gradient = (grad * x).sum()
        if ctx.owed.is_deferring:
            ctx.owed.owe(weight, Gradient(gradient, [], ""))
            gradient = None
        return grad * weight, gradient, None


def accumulated(is_split, is_checkpointed):
    """The gradients of two weights, the first used three times, after 5 micro-batches; W's come 2 late."""
    weights = [torch.nn.Parameter(torch.tensor(each)) for each in (1.1, 0.7)]
    weights[0].main_grad = torch.zeros(())
    weights[0].register_post_accumulate_grad_hook(into_main_grad)
    owed, generator = OwedGradients(), torch.Generator().manual_seed(4)

    def part(x):
        for weight in (weights[0], weights[1], weights[0]):
            x = torch.sin(Scale.apply(x, weight, owed))
        return x

    for microbatch in range(5):
        x = torch.randn(100, generator=generator, requires_grad=True)
        x = checkpoint(part, x, use_reentrant=True) if is_checkpointed else part(x)
        loss = Scale.apply(x, weights[0], owed).sum()
        if not is_split:
            loss.backward()
            continue
        with owed.deferring(0, microbatch):
            loss.backward()
        if microbatch >= 2:
            owed.pay(0, microbatch - 2)
    if is_split:
        owed.pay(0, 3)
        owed.pay(0, 4)
    owed.assert_paid()
    return weights[0].main_grad, weights[1].grad


def into_main_grad(weight):
    if weight.grad is not None:  # it also runs where the gradient is owed
        weight.main_grad.add_(weight.grad)
        weight.grad = None


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_several_uses_of_a_weight_are_summed_as_autograd_sums_them(is_checkpointed):
    whole, split = (accumulated(is_split, is_checkpointed) for is_split in (False, True))
    assert all(map(torch.equal, whole, split)) and whole[1] != 0


def test_gradients_run_in_the_order_of_the_backward_and_are_prepared_one_ahead():
    log, told = [], []
    owed = OwedGradients(lambda chunk, weight: told.append((chunk, weight)))
    one, two = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    with owed.deferring(1, 0):
        for name, weight, value in (("a", one, torch.ones(1)), ("b", two, None), ("c", one, torch.ones(1))):
            owed.owe(weight, Gradient(value, log, name))
    assert owed.weights(1, 0) == [one, two]
    owed.pay(1, 0)
    assert log == ["prepare a", "prepare c", "prepare b", "compute a", "compute c", "compute b"]
    assert told == [(1, one), (1, two)] and one.grad == 2 and two.grad is None


def test_an_older_gradient_covers_what_an_i_waits_for():
    log = []
    owed = OwedGradients(covers={(0, 1): (0, 0)})
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    for microbatch in range(2):
        with owed.deferring(0, microbatch):
            owed.cover_communication()
            for name, weight in zip("ab", weights):
                owed.owe(weight, Gradient(torch.ones(1), log, f"{name}{microbatch}"))
    assert log == ["prepare a0", "compute a0"]
    owed.pay(0, 0)
    assert log[2:] == ["prepare b0", "compute b0"]
    owed.pay(0, 1)
    owed.assert_paid()
    assert [weight.grad for weight in weights] == [2, 2]


def test_what_is_owed_at_the_end_of_a_step_is_named():
    owed = OwedGradients()
    with owed.deferring(1, 3):
        pass
    with pytest.raises(AssertionError, match=r"still owed: \(1, 3\)"):
        owed.assert_paid()


def test_an_i_is_covered_by_the_older_w_behind_it_but_not_by_one_that_ends_its_chunk():
    shape = PipelineShape(2, 1, 3)
    assert covers(from_text("1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2")[0], shape) == {(0, 1): (0, 0), (0, 2): (0, 1)}
    assert covers(from_text("0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2")[0], shape) == {}
    shape = PipelineShape(4, 2, 4)
    plan = lower(breadth_first(shape, weight_lag=[2] * 4), shape)
    assert covers(plan[3], shape)[0, 0] == (1, 2)  # of the chunk before
    assert (0, 1) not in covers(plan[3], shape)  # the last W of that chunk launches its reduction


class ShardedChunk(torch.nn.Module):
    def set_requires_gradient_sync(self, is_on):
        self.is_on = is_on


def test_the_reduction_of_a_sharded_chunk_behind_its_last_weights_waits_for_the_one_before_and_frees_its_input():
    waited, chunks = [], [ShardedChunk() for _ in range(3)]
    stream = SimpleNamespace(wait_event=waited.append)
    context = SimpleNamespace(reduce_scatter_states=[], device_handle=SimpleNamespace(current_stream=lambda: stream))
    fully_sharded._prepared[chunks[0]] = fully_sharded.Reductions(context)
    sharded = fully_sharded.FullySharded(chunks)
    for chunk, units in enumerate(sharded._units):  # two parameter groups each, which FSDP2 reduces one by one
        for part in "ab":
            state = SimpleNamespace(event=f"{chunk}{part}")
            group = SimpleNamespace(post_backward=lambda state=state: context.reduce_scatter_states.append(state))
            units.append(
                SimpleNamespace(_get_fsdp_state=lambda group=group: SimpleNamespace(_fsdp_param_groups=[group]))
            )
    for chunk, before in ((2, []), (1, ["2b", "2a"]), (0, ["2b", "2a", "1b", "1a"])):
        sharded.before_last_backward(chunk)
        sharded.before_last_weights(chunk, [])
        sharded.reduce_grad(chunk)
        assert not chunks[chunk].is_on  # from here on hooks of another step's I's reduce nothing
        assert waited == before
        assert [state.event for state in context.reduce_scatter_states] == [f"{chunk}b", f"{chunk}a"]
