"""Processes forked from one that has imported Megatron once, and the answers of each. Standard library only.

    with Forks("megatron.training.training") as forks:
        for rank in range(4):
            forks.start(f"rank {rank}", answers_of, rank)  # a function that yields its answers
        while (found := forks.next()) is not None:
            name, answer = found

The server imports the modules when the first process starts, and serves all Forks of this interpreter.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from .errors import UserError
from .processes import Forked, Ranks

__all__ = ["Forks"]

_ANSWER, _REFUSED, _DONE = range(3)


class Forks:
    """Processes that answer. Leaving the `with` block ends those that still run.

    preload: modules that the server imports. at_most: how many processes run at a time; None for all.
    context: multiprocessing's, for memory that the processes share.
    """

    def __init__(self, *preload: str, at_most: int | None = None):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["megatron_bfpp.console.quiet_preload", *preload])
        self._ranks, self._at_most = Ranks(), at_most
        self._waiting: deque[tuple[str, Callable[..., Iterator[Any]], tuple[Any, ...]]] = deque()
        self._running: dict[Connection, tuple[str, Forked]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ranks.end()

    def __len__(self) -> int:
        """Count the processes that are not done."""
        return len(self._running) + len(self._waiting)

    def start(self, name: str, target: Callable[..., Iterator[Any]], *args: Any) -> None:
        """Run target(*args), which yields its answers, in a new process. name: for messages of errors."""
        self._waiting.append((name, target, args))
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self._waiting and (self._at_most is None or len(self._running) < self._at_most):
            name, target, args = self._waiting.popleft()
            ours, theirs = self.context.Pipe(duplex=False)
            process = self.context.Process(target=_answer, args=(target, args, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process ends the pipe
            forked = Forked(process)
            self._running[ours] = name, forked
            self._ranks.add(forked)

    def next(self, timeout_s: float | None = None) -> tuple[str, Any] | None:
        """Return the next answer behind the name of its process; None once all processes are done.

        Raises UserError with the message of a process that failed, with the name of one that was killed, or if no
        process answers for timeout_s seconds.
        """
        while self._running:
            ready = wait(list(self._running), timeout_s)
            if not ready:
                raise UserError(f"no process has answered for {timeout_s:.0f} s: one of {len(self._running)} hangs.")
            pipe = next(each for each in self._running if each in ready)
            name, process = self._running[pipe]
            try:
                kind, content = pipe.recv()
            except EOFError:
                process.wait()
                raise UserError(_early_end(name, process.poll())) from None
            if kind == _REFUSED:
                raise UserError(content)
            if kind == _ANSWER:
                return name, content
            del self._running[pipe]
            self._start_waiting()
        return None


def _early_end(name: str, code: int | None) -> str:
    if code is None or code >= 0:
        return f"the process of {name} ended with {code} before it had an answer."
    sent = signal.Signals(-code)
    hint = "\n  It is sent most often for want of memory." if sent == signal.SIGKILL else ""
    if sent in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL):  # faulthandler's
        hint = "\n  Its Python stack stands in the standard error."
    return f"the process of {name} was ended by {sent.name} before it had an answer.{hint}"


def _answer(target: Callable[..., Iterator[Any]], args: tuple[Any, ...], pipe: Connection) -> None:
    """Send the answers of this process, and at last that it is done or what stopped it."""
    faulthandler.enable()
    try:
        for answer in target(*args):
            pipe.send((_ANSWER, answer))
        last: tuple[int, str] = _DONE, ""
    except UserError as error:
        last = _REFUSED, str(error)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(frame.filename)}, line {frame.lineno}"
        last = _REFUSED, f"{type(error).__name__}: {error} ({place})"
    pipe.send(last)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # not Python's own end: destroying process groups can wait for ranks that are gone
