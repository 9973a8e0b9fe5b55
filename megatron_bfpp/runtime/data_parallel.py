"""Launches data-parallel communication chunk by chunk, for replicated and ZeRO-1 parameters.

The callbacks are those of Megatron's DistributedDataParallel, which its training loop puts into the config
(no_sync_func, grad_sync_func, param_sync_func). This module decides only when to call them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self

from torch.nn import Module, Parameter

NoSync = Callable[[], AbstractContextManager[object]]
Sync = Callable[[Iterator[Parameter]], None]


class DataParallel:
    """A context around one step, in which gradients are reduced only where the plan has a REDUCE_GRAD.

    no_sync: one per chunk, a single one for all chunks, or None.
    grad_sync: per chunk, launches its reduction explicitly. None: leaving no_sync before the last backward lets
        Megatron's hooks launch it, bucket by bucket, while that backward runs.
    param_sync: per chunk, launches the gather of its parameters. None: whoever needs them gathers them.
    model: the chunks, whose parameters the two are called with.
    in_backward: chunks whose reduction the hooks start during the last backward in any case; grad_sync launches the
    rest.
    ready: where backwards are split, the hooks fire before the weights' gradients are there: in the last W of such a
    chunk this is called for each of its parameters, once that has its gradient.
    """

    def __init__(
        self,
        no_sync: list[NoSync] | NoSync | None,
        grad_sync: list[Sync] | None,
        param_sync: list[Sync] | None,
        model: list[Module],
        in_backward: Collection[int] = (),
        ready: Callable[[Module, Parameter], None] | None = None,
    ):
        self._no_sync = no_sync
        self._grad_sync, self._param_sync = grad_sync, param_sync
        self._model, self._in_backward, self._ready = model, in_backward, ready
        self._closed: dict[int, ExitStack] = {}  # chunk -> its entered no_sync; key 0 stands for all with a single one
        self._unreduced = set(range(len(model)))

    def __enter__(self) -> Self:
        for chunk in range(len(self._no_sync) if isinstance(self._no_sync, list) else 1):
            self._close(chunk)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for chunk in list(self._closed):
            self._open(chunk)

    def before_last_backward(self, chunk: int) -> None:
        """Prepare the chunk's last backward of the step, a B or a W."""
        if self._grad_sync is None or chunk in self._in_backward:
            self._open(chunk)

    def before_last_weights(self, chunk: int, owed: Collection[Parameter]) -> None:
        """Register the parameters of a chunk that its last W has nothing to add to. owed: the others."""
        others = {id(each) for each in owed}
        for parameter in self._model[chunk].parameters():
            if parameter.requires_grad and id(parameter) not in others:
                self.added(chunk, parameter)

    def added(self, chunk: int, parameter: Parameter) -> None:
        """Register a parameter of a chunk after a W has added its gradient."""
        if self._ready is not None:
            self._ready(self._model[chunk], parameter)

    def reduce_grad(self, chunk: int) -> None:
        """Launch the chunk's reduction after its last backward, unless the hooks have launched it."""
        self._unreduced.discard(chunk)
        self._open(chunk)
        if self._grad_sync is not None:
            self._grad_sync[chunk](self._model[chunk].parameters())
        if not isinstance(self._no_sync, list) and self._unreduced:
            self._close(chunk)  # one no_sync for all chunks: the others still accumulate

    def unshard(self, chunk: int) -> None:
        """Launch the gather of the chunk's parameters."""
        if self._param_sync is not None:
            self._param_sync[chunk](self._model[chunk].parameters())

    def reshard(self, chunk: int) -> None:
        """Fail: replicated parameters are never given up, and no plan for them has a RESHARD."""
        raise AssertionError(f"RESHARD of chunk {chunk}, whose parameters are replicated")

    def _key(self, chunk: int) -> int:
        return chunk if isinstance(self._no_sync, list) else 0

    def _close(self, chunk: int) -> None:
        if self._no_sync is not None:
            stack = ExitStack()
            no_sync = self._no_sync[chunk] if isinstance(self._no_sync, list) else self._no_sync
            stack.enter_context(no_sync())
            self._closed[self._key(chunk)] = stack

    def _open(self, chunk: int) -> None:
        stack = self._closed.pop(self._key(chunk), None)
        if stack is not None:
            stack.close()
