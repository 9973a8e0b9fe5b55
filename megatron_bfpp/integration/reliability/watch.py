"""Nothing hangs in silence: agreement of all ranks before a model is built, and a watchdog over the steps.

The seams: parallel_state.initialize_model_parallel, which Megatron calls as soon as the ranks have met, and train_step, at
whose end nothing is pending. Under 1f1b the ranks compare and Megatron is left alone: no watchdog.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import itertools
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ...console.version import __version__
from ...runtime.p2p import PeerLostError
from ...runtime.watchdog import Watchdog
from .. import process
from ..flags.settings import settings_of, timeout_minutes, timeout_of
from ..seams import Seam
from .agreement import agree

INITIALIZE = Seam("megatron.core.parallel_state", "initialize_model_parallel", ("pipeline_model_parallel_size",))
# Whose first call in a rank that saves starts a process of 0.5 GB.
RESULTS_QUEUE = Seam(
    "megatron.core.dist_checkpointing.strategies.filesystem_async", "get_write_results_queue", ("mp_mode",)
)
TRAIN_STEP = Seam("megatron.training.training", "train_step", ("forward_step_func",))
MOST_EXIT_S = 30  # that a process with an uncaught error has for its end

_watchdog: Watchdog | None = None
_meetings = itertools.count()


def meeting(initialize: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of initialize_model_parallel: all ranks have met, and no group of some of them exists yet."""

    @functools.wraps(initialize)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        options = process.megatron_args()
        if options is not None and dist.is_initialized() and dist.get_backend() != "fake":
            _meet(options)
        return initialize(*args, **kwargs)

    return wrapper


def stepping(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of train_step: between steps nothing is timed. A checkpoint may take what it takes."""

    @functools.wraps(train_step)  # others that replace it look at its parameters
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = train_step(*args, **kwargs)
        except Exception:
            process.ACTIVITY.fail()
            raise
        process.ACTIVITY.end()
        return answer

    return wrapper


def _meet(args: Any) -> None:
    """Collective over all ranks."""
    global _watchdog
    # A name for each time that these processes meet: a store outlives the process groups that it made.
    store = dist.PrefixStore(f"bfpp/{next(_meetings)}", distributed_c10d._get_default_store())
    rank, size = dist.get_rank(), dist.get_world_size()
    digest = agree(store, args, rank, size, 60.0 * timeout_minutes(args))
    timeout_s = timeout_of(args)
    settings = settings_of(args)
    is_on = settings.schedule != "1f1b" and timeout_s > 0 and not getattr(args, "inprocess_restart", False)
    if rank == 0:
        watched = f", an action of a step may take {timeout_s:g} s" if is_on else ""
        print(f"megatron_bfpp {__version__}: all {size} ranks agree, {digest}{watched}", flush=True)
    stop()  # that of process groups before these
    if is_on:
        _watchdog = Watchdog(store, rank, size, timeout_s, process.ACTIVITY, _told)
        _watchdog.start()
        process.is_watched = True
        atexit.register(_watchdog.stop)
        sys.excepthook = _ending(sys.excepthook, _watchdog)


def stop() -> None:
    """End the watchdog, if there is one."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        atexit.unregister(_watchdog.stop)
        _watchdog = None
        process.is_watched = False


def _told(reason: str) -> None:
    for each in process.ON_END:
        each(reason)


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _ending(previous: Hook, watchdog: Watchdog) -> Hook:
    """What Python calls with an error that nobody has caught, before the process ends."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _watchdog is not watchdog:  # stopped meanwhile
            previous(kind, error, trace)
            return
        process.ACTIVITY.fail()
        if not isinstance(error, PeerLostError):  # whose traceback would tell of this rank, which is not at fault
            previous(kind, error, trace)
        text = str(error).strip()
        named = type(error).__name__ + (f": {text.splitlines()[0]}" if text else "")
        watchdog.failed(f"lost a message: {text}" if isinstance(error, PeerLostError) else f"raised {named}")
        # Process groups whose other ends are gone can keep a process from ending.
        faulthandler.dump_traceback_later(MOST_EXIT_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115

    return hook
