"""The state of this process that a step reports to: its activity, what records it, and Megatron's command line.

The step writes here and imports no observer; observe/ and reliability/ read here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from ..runtime.activity import Activity
from ..runtime.fully_sharded import FullySharded
from ..schedule import Action, PipelineShape
from ..timeline.recorder import Recorder

ACTIVITY = Activity()  # of this process
ON_END: list[Callable[[str], None]] = []  # called with the reason before the watchdog ends the process
is_watched = False  # whether a watchdog runs, which sees the end of the optimizer


def megatron_args() -> Any:
    """Megatron's parsed command line; None without megatron.training, and before it is parsed."""
    variables = sys.modules.get("megatron.training.global_vars")
    return None if variables is None else variables._GLOBAL_ARGS


def this_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def begin_step(evaluation: bool, shape: PipelineShape, ranks: Sequence[int] = (), pp_rank: int | None = None) -> None:
    """The schedule is called. ranks: global, by pp_rank; none where Megatron's loop sends the messages."""
    args = megatron_args()
    step = "" if args is None else f"step {args.curr_iteration + 1}"  # as the log counts
    ACTIVITY.begin_step(f"evaluation after {step}" if evaluation else step, shape, ranks, pp_rank)


def after_schedule(evaluation: bool) -> None:
    """The schedule returns: what follows it in a step is the optimizer's, if there is a watchdog that sees its end."""
    if evaluation or not is_watched:
        ACTIVITY.end()
    else:
        ACTIVITY.begin("the optimizer")


class Recording:
    """What this process records now, and what is known of the step that it recorded last."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None  # within a recorded step of a recorded rank
        self.measured: dict[str, Any] = {}  # after a recorded step, on every rank: for the logs

    def around(self, gates: object, shape: PipelineShape, pp_rank: int) -> AbstractContextManager[object]:
        """Note what the gates of fully sharded chunks wait for; those of Megatron's replicas are noted by observe/tracing.py."""
        if self.recorder is None or not isinstance(gates, FullySharded):
            return nullcontext()
        stack = ExitStack()
        for owner, name, chunk, op in gates.waits():
            stack.enter_context(noted(owner, name, Action(shape.stages_on(pp_rank)[chunk], op), self.recorder))
        return stack


RECORDING = Recording()  # of this process


@contextmanager
def noted(owner: Any, name: str, action: Action, recorder: Recorder) -> Iterator[None]:
    """For a while, calls of a method of this one object are noted as waits."""
    method = getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        with recorder.waiting_for_replicas(action):
            return method(*args, **kwargs)

    setattr(owner, name, noting)
    try:
        yield
    finally:
        delattr(owner, name)
