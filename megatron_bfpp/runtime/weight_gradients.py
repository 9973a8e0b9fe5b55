"""Keeps the gradients of weights that a split backward leaves over: an I owes them, the W of its microbatch pays.

The framework's layers call `owe` in place of computing a gradient. What they hand over is computed in the order in
which the backward came to it, one microbatch after the other, and summed as autograd would have: where a weight is used
several times in one backward, the sum is added, not one gradient after the other. The bits are those of a whole
backward.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Protocol

import torch
from torch.nn import Parameter

from ..schedule.ir import COMPUTE, Action, Op, PipelineShape


class Gradient(Protocol):
    """One gradient that is owed: of one use of a weight."""

    def prepare(self) -> None:
        """Launch what the gradient needs from other ranks. Called before `compute`, often while another one runs."""

    def compute(self) -> torch.Tensor | None:
        """Return the gradient, or None if it has been added where it belongs."""


@dataclass
class _Owed:
    """The gradients that one backward owes to one weight, in the order of its uses."""

    weight: Parameter
    gradients: list[Gradient] = field(default_factory=list)

    def prepare(self) -> None:
        for gradient in self.gradients:
            gradient.prepare()


# Called with the chunk and a weight whose gradient of this microbatch is there.
Added = Callable[[int, Parameter], None]
Key = tuple[int, int]  # chunk, microbatch


def covers(actions: list[Action], shape: PipelineShape) -> dict[Key, Key]:
    """Return for each I of a rank's plan the W that follows it, if it is an older one.

    The W of a last microbatch is left out: it launches reductions, for which `Executor` prepares just before it.
    """
    found: dict[Key, Key] = {}
    computed = [action for action in actions if action.op in COMPUTE]
    for before, after in pairwise(computed):
        one, other = ((shape.chunk_of(each.stage), each.microbatch or 0) for each in (before, after))
        is_pair = before.op is Op.I and after.op is Op.W
        if is_pair and one != other and after.microbatch != shape.num_microbatches - 1:
            found[one] = other
    return found


class OwedGradients:
    """The owed gradients of one rank, for one step.

    added: is told of each weight whose gradient has been added. covers: for an I, the W that may run during it.
    """

    def __init__(self, added: Added = lambda chunk, weight: None, covers: Mapping[Key, Key] | None = None):
        self._added, self._covers = added, covers or {}
        self._owed: dict[Key, dict[tuple[int, int], _Owed]] = {}  # -> (backward, weight) ->
        self._key: Key | None = None  # of the I that runs
        self._cover: Key | None = None  # the W whose gradients may run during it

    @property
    def is_deferring(self) -> bool:
        """Return whether an I runs, to which gradients may be owed."""
        return self._key is not None

    @property
    def chunk(self) -> int:
        """Return the chunk of the I that runs."""
        assert self._key is not None, "an I runs"
        return self._key[0]

    @contextmanager
    def deferring(self, chunk: int, microbatch: int) -> Iterator[None]:
        """Run an I: gradients are owed to this chunk and microbatch."""
        assert self._key is None and (chunk, microbatch) not in self._owed, f"({chunk}, {microbatch}) runs once"
        self._key = chunk, microbatch
        self._cover = self._covers.get(self._key)
        self._owed[self._key] = {}
        try:
            yield
        finally:
            self._key = self._cover = None

    def owe(self, weight: Parameter, gradient: Gradient) -> None:
        """Keep a gradient for the W of the I that runs."""
        assert self._key is not None, "only an I owes"
        # A checkpointed part of the model runs a backward of its own, whose sums autograd adds one by one.
        backward = torch._C._current_graph_task_id()
        owed = self._owed[self._key].setdefault((backward, id(weight)), _Owed(weight))
        owed.gradients.append(gradient)

    def cover_communication(self) -> None:
        """Compute one older gradient while the I that runs waits for other ranks. None is owed: do nothing."""
        if self._cover is not None and (owed := self._owed[self._cover]):
            one = owed.pop(next(iter(owed)))
            one.prepare()
            self._add(self._cover[0], one)

    def weights(self, chunk: int, microbatch: int) -> list[Parameter]:
        """Return the weights to which a microbatch still owes gradients."""
        return [owed.weight for owed in self._owed[chunk, microbatch].values()]

    @torch.no_grad()
    def pay(self, chunk: int, microbatch: int) -> None:
        """Run a W: compute and add all that its I has left over. What other ranks send for it comes one ahead."""
        owed = deque(self._owed.pop((chunk, microbatch)).values())
        if owed:
            owed[0].prepare()
        while owed:
            one = owed.popleft()
            if owed:
                owed[0].prepare()
            self._add(chunk, one)

    def assert_paid(self) -> None:
        """AssertionError if a W has not run."""
        assert not self._owed, f"weights' gradients are still owed: {', '.join(map(str, self._owed))}"

    def _add(self, chunk: int, owed: _Owed) -> None:
        total: torch.Tensor | None = None
        for gradient in owed.gradients:
            each = gradient.compute()
            if each is not None:
                total = each if total is None else total + each
        if total is not None:
            _accumulate(owed.weight, total)
        self._added(chunk, owed.weight)


def _accumulate(weight: Parameter, gradient: torch.Tensor) -> None:
    """Add a gradient to Megatron's buffer of the weight if it has one, else as autograd does."""
    if getattr(weight, "main_grad", None) is not None:
        weight.main_grad.add_(gradient)  # type: ignore[attr-defined]
    elif weight.grad is None:
        weight.grad = gradient
    else:
        weight.grad.add_(gradient)


def placeholder(weight: Parameter) -> torch.Tensor | None:
    """Return what stands for a gradient that is owed, or was added elsewhere; None where nothing has to.

    Megatron's hook demands a gradient under --overlap-grad-reduce, and adds nothing if it is told so here.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return _zeros(weight.shape, weight.dtype, weight.device).detach()


@cache
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return one tensor for all weights of a shape: nothing writes to it, and AccumulateGrad takes it as it is."""
    return torch.zeros(shape, dtype=dtype, device=device)
