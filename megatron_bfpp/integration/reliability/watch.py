"""No job hangs in silence: all ranks compare before a model is built, and a watchdog times the steps.

The seams: parallel_state.initialize_model_parallel, which Megatron calls as soon as the ranks have met, and train_step,
at whose end nothing is pending. Under 1f1b the ranks compare and Megatron is left alone: no watchdog.
"""

import atexit
import faulthandler
import inspect
import itertools
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ...console.errors import UserError
from ...runtime.p2p import PeerLostError
from ...runtime.watchdog import Watchdog
from ...schedule.model.chunks import NEEDS_2
from .. import process, seams
from ..flags.settings import timeout_minutes, timeout_of
from .agreement import agree, record

MOST_DUMP_S = 5.0  # that a rank may take to write its flight recorder
MOST_EXIT_S = 30  # the time that a process with an uncaught error has for its end

WATCHDOG = "the watchdog"
_meetings = itertools.count()


def meeting(initialize: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run initialize_model_parallel: all ranks have met, and no group of some of them exists yet."""
    if dist.is_initialized() and dist.get_backend() != "fake":
        given = inspect.signature(initialize).bind(*args, **kwargs)
        given.apply_defaults()
        pp_size, chunks = (given.arguments[f"{name}pipeline_model_parallel_size"] for name in ("", "virtual_"))
        _meet(process.megatron_args(), pp_size, chunks)
    return initialize(*args, **kwargs)


def stepping(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run train_step: between steps nothing is timed, so that a checkpoint may take what it takes."""
    try:
        with seams.changed(process, is_in_train_step=True):
            answer = train_step(*args, **kwargs)
    except Exception:
        process.ACTIVITY.fail()
        raise
    process.ACTIVITY.end()
    return answer


def _meet(args: Any, pp_size: int, chunks: int | None) -> None:
    """Compare all ranks, and start the watchdog of this one. Collective over all ranks; UserError on all of them.

    args: Megatron's arguments, of any trainer; None without.
    """
    settings = process.settings()
    # A name for each time that these processes meet: a store outlives the process groups that it made.
    store = distributed_c10d.PrefixStore(f"bfpp/{next(_meetings)}", distributed_c10d._get_default_store())
    rank, size = dist.get_rank(), dist.get_world_size()
    known = record(args, settings, pipeline_ranks=pp_size, model_chunks=chunks)
    digest = agree(store, known, rank, size, 60.0 * timeout_minutes(args))
    if settings.schedule != "1f1b" and pp_size > 1 and (chunks or 1) < 2:
        _refuse_or_warn(f"there are {chunks or 1} on each of {pp_size} pipeline ranks", rank)
    timeout_s = timeout_of(args)
    is_on = settings.schedule != "1f1b" and timeout_s > 0 and not getattr(args, "inprocess_restart", False)
    if rank == 0:
        watched = f", an action of a step may take {timeout_s:g} s" if is_on else ""
        process.say(f"all {size} ranks agree, {digest}{watched}")
    seams.undo(WATCHDOG)  # the watchdog of process groups before these
    if is_on:
        watchdog = Watchdog(store, rank, size, timeout_s, process.ACTIVITY, _tell_observers)
        with seams.together(WATCHDOG) as undo:
            watchdog.start()
            undo.callback(watchdog.stop)
            atexit.register(watchdog.stop)
            undo.callback(atexit.unregister, watchdog.stop)
            seams.put(undo, sys, "excepthook", _ending(sys.excepthook, watchdog))


def _refuse_or_warn(few: str, rank: int) -> None:
    """Refuse pipelines without model chunks, for which Megatron has 1F1B alone.

    enable("breadth-first") stands in for Megatron's interleaved schedule and leaves others alone: it warns.
    """
    change = "Set virtual_pipeline_model_parallel_size to 2 or more in the trainer's configuration."
    if process.explicit_schedule is None:
        raise UserError(f"{NEEDS_2}, but {few}.\n  {change}")
    if rank == 0:
        process.say(f"WARNING: breadth-first needs at least 2 model chunks per rank, but {few}: 1F1B runs. {change}")


def _tell_observers(reason: str) -> None:
    """Keep what ends with the process: the files of the run, and NCCL's flight recorder."""
    for each in process.ON_END:
        each(reason)
    keep_flight_recorder()


def keep_flight_recorder() -> None:
    """Write what NCCL's flight recorder holds, which os._exit would lose; nothing where it is off.

    The file is TORCH_FR_DUMP_TEMP_FILE, or /tmp/nccl_trace_rank_, with the rank behind it.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not dist.is_initialized() or dist.get_backend() != "nccl":
        return
    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE") or os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    path = f"{prefix or '/tmp/nccl_trace_rank_'}{dist.get_rank()}"

    def keep() -> None:
        trace = dump()
        with suppress(OSError):  # the job ends for another reason, which the log has
            if trace:
                with open(path, "wb") as file:
                    file.write(trace)
                print(f"megatron_bfpp: NCCL's flight recorder is in {path}", file=sys.stderr, flush=True)

    # NCCL may be what hangs: the end of the process does not wait for it for ever.
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    thread.join(MOST_DUMP_S)


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _ending(previous: Hook, watchdog: Watchdog) -> Hook:
    """Wrap the function that Python calls with an error that nobody has caught, before the process ends."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not seams.is_applied(WATCHDOG):  # stopped, but somebody's hook still calls this one
            previous(kind, error, trace)
            return
        process.ACTIVITY.fail()
        if not isinstance(error, PeerLostError):  # its traceback would show this rank, which is not at fault
            previous(kind, error, trace)
        text = str(error).strip()
        named = type(error).__name__ + (f": {text.splitlines()[0]}" if text else "")
        watchdog.failed(f"lost a message: {text}" if isinstance(error, PeerLostError) else f"raised {named}")
        # Process groups whose other ends are gone can keep a process from ending.
        sink = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
        faulthandler.dump_traceback_later(MOST_EXIT_S, exit=True, file=sink)

    return hook
