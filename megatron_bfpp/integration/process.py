"""The state of this process that a step reports to: its activity, what records it, and Megatron's command line.

The step writes here and imports no observer; observe/ and reliability/ read here.
"""

import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..console.errors import UserError
from ..console.files import write_whole
from ..console.version import __version__
from ..runtime.activity import Activity
from ..runtime.fully_sharded import FullySharded
from ..schedule import Action, PipelineShape
from ..timeline.recorder import Recorder
from . import seams
from .flags.settings import SCHEDULES, Settings, settings_of
from .seams import changed

ACTIVITY = Activity()  # of this process
ON_END: list[Callable[[str], None]] = []  # called with the reason before the watchdog ends the process
explicit_schedule: str | None = None  # the one that enable() was called with last
is_in_train_step = False  # whether Megatron's train_step runs, which tells of the end of the optimizer
_training_steps = 0  # calls of the schedule with backwards, for trainers that count none


def say(text: str) -> None:
    """Print a line to the job's log, under the plugin's name and version."""
    print(f"megatron_bfpp {__version__}: {text}", flush=True)


def write_or_warn(path: str, text: str, flag: str) -> None:
    """Write a file whole, or a warning: a run of days does not end for a file that cannot be written."""
    try:
        write_whole(path, text, flag)
    except UserError as error:
        say(f"WARNING: {error}")


@cache
def versions() -> dict[str, str | None]:
    """Return the versions of what runs here, by package; None for what is not there."""
    from megatron.core.package_info import __version__ as release  # a checkout need not be installed

    # Megatron adds the commit of whatever repository is around its folder: its own only where it is a checkout.
    place = str(sys.modules["megatron.core.package_info"].__file__)
    is_installed = bool({"site-packages", "dist-packages"} & {*Path(place).parts})
    megatron_core = str(release).partition("+")[0] if is_installed else str(release)
    try:
        engine = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        engine = None
    return {
        "megatron-core": megatron_core,
        "torch": torch.__version__,
        "transformer-engine": engine,
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
    }


def megatron_args() -> Any:
    """Return Megatron's parsed command line; None without megatron.training, and before it is parsed."""
    variables = sys.modules.get("megatron.training.global_vars")
    return None if variables is None else variables._GLOBAL_ARGS


def choose(schedule: str) -> None:
    """Take the schedule of enable(), which counts more than a flag, until the next one or `seams.undo_all`."""
    if schedule not in SCHEDULES:
        raise UserError(f"pipeline_schedule={schedule!r} does not exist; use {' or '.join(SCHEDULES)}")
    seams.undo(choose)
    with seams.together(choose) as undo:
        seams.put(undo, sys.modules[__name__], "explicit_schedule", schedule)


def settings() -> Settings:
    """Return the choice for this process: by enable(), else by the command line, the environment, the defaults."""
    return settings_of(megatron_args(), explicit_schedule)


def this_device() -> torch.device:
    """Return the current CUDA device, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def begin_step(evaluation: bool, shape: PipelineShape, ranks: Sequence[int] = (), pp_rank: int | None = None) -> None:
    """Note that the schedule is called. ranks: global, by pp_rank; none where Megatron's loop sends the messages."""
    global _training_steps
    _training_steps += not evaluation
    # Megatron's training loop has the number that its log shows; no other trainer sets it.
    iteration = getattr(megatron_args(), "curr_iteration", None)
    step = f"step {_training_steps if iteration is None else iteration + 1}"
    ACTIVITY.begin_step(f"evaluation after {step}" if evaluation else step, shape, ranks, pp_rank)


def after_schedule(evaluation: bool) -> None:
    """Note that the schedule returns: the optimizer follows in a training step, if somebody tells of its end.

    A trainer other than Megatron's may do anything now, for as long as it likes: nothing is timed until its next step.
    """
    if evaluation or not is_in_train_step:
        ACTIVITY.end()
    else:
        ACTIVITY.begin("the optimizer")


class Recording:
    """The recorder of this process while it records, and what is known of the step that it recorded last."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None  # within a recorded step of a recorded rank
        self.measured: dict[str, Any] = {}  # after a recorded step, on every rank: for the logs

    def around(self, gates: object, shape: PipelineShape, pp_rank: int) -> AbstractContextManager[object]:
        """Note the waits of fully sharded chunks; observe/tracing.py notes those of Megatron's replicas."""
        if self.recorder is None or not isinstance(gates, FullySharded):
            return nullcontext()
        stack = ExitStack()
        for owner, name, chunk, op in gates.waits():
            stack.enter_context(noted(owner, name, Action(shape.stages_on(pp_rank)[chunk], op), self.recorder))
        return stack


RECORDING = Recording()  # of this process


@contextmanager
def noted(owner: Any, name: str, action: Action, recorder: Recorder) -> Iterator[None]:
    """Note calls of a method of this one object as waits, for a while."""
    method = getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        with recorder.waiting_for_replicas(action):
            return method(*args, **kwargs)

    with changed(owner, **{name: noting}):
        yield
