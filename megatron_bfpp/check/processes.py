"""The processes of a dry run: one per pipeline rank, as many at a time as there are cores, forked from one with Megatron in it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from ..console.errors import UserError

if TYPE_CHECKING:
    from .answers import Question, Rank

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["megatron.training.training", "megatron_bfpp.integration.gpt.releases", "megatron_bfpp.integration.step.forward_backward",
     "megatron_bfpp.check.rank", "megatron_bfpp.integration.gpt.script", __name__]
)  # fmt: skip


def examine_ranks(question: Question, pp_ranks: list[int], on_rank: Callable[[int], None]) -> list[Rank]:
    """The answers in the order of `pp_ranks`. on_rank: called with each rank that is done.

    Raises UserError with what the first rank that is refused was told, or where one is killed.
    """
    waiting = list(pp_ranks)
    running: dict[int, tuple[Any, Connection]] = {}
    found: dict[int, Rank] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _cores():
                pp_rank = waiting.pop(0)
                running[pp_rank] = _start(question, pp_rank, pp_rank == pp_ranks[0])
            ready = wait([answer for _, answer in running.values()])
            for pp_rank, (process, answer) in list(running.items()):
                if answer in ready:
                    del running[pp_rank]
                    found[pp_rank] = _answer(pp_rank, process, answer)
                    on_rank(pp_rank)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()
    return [found[pp_rank] for pp_rank in pp_ranks]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(question: Question, pp_rank: int, with_plans: bool) -> tuple[Any, Connection]:
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_rank, args=(question, pp_rank, with_plans, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _answer(pp_rank: int, process: Any, answer: Connection) -> Rank:
    try:
        found = answer.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"the process of pp_rank {pp_rank} ended with {process.exitcode} before it had an answer.\n"
            "  -9 means that it was killed, most often for want of memory."
        ) from None
    process.join()
    if isinstance(found, str):
        raise UserError(found)
    return found  # type: ignore[no-any-return]


def _rank(question: Question, pp_rank: int, with_plans: bool, answer: Connection) -> None:
    from ..integration.gpt.releases import ARGS_DEFAULTS, refuse_other_tasks
    from .rank import examine

    found: Rank | str
    with _silence():
        try:
            found = examine(question, pp_rank, with_plans, refuse_other_tasks, ARGS_DEFAULTS)
        except UserError as error:
            found = str(error)
        answer.send(found)
        os._exit(0)  # not Python's own end, which joins the threads of process groups


@contextlib.contextmanager
def _silence() -> Any:
    """Megatron lists its arguments and its groups; the answer is what counts."""
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
