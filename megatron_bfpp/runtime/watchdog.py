"""Ends a job whose step does not come to an end, and says of every rank where it was.

Each rank has two threads of its own. One looks at this rank's `Activity`: what has not ended within the time allowed is an
alarm. The other looks whether some rank has raised an alarm, in the store through which the ranks met at their start; it
needs neither NCCL nor gloo, whose operations are what hangs. On an alarm every rank says what it was doing, and ends; the
first rank collects what the others say. A rank that says nothing is dead or stopped.

Torchrun ends the ranks of a node by SIGTERM as soon as one of them has died, which is before they could say anything:
that signal is an alarm of this rank alone, unless somebody else handles it (Megatron's --exit-signal-handler).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from .activity import Activity, Status
from .testimony import summary

MOST_GRACE_S = 5.0  # how long the first rank waits for what the others say; a part of the time allowed if that is short
RANKS_PER_S = 1024  # that ask the store in a second; a TCPStore answers 100 times as many
TERMINATED = 128 + signal.SIGTERM


class Watchdog:
    """Of one rank. `start`, then `failed` for an error that nobody catches; `stop` at the end of the process."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout_s: float,
        activity: Activity,
        on_end: Callable[[str], None] | None = None,
    ):
        """store: where the ranks met, under a name of this job's; a connection of its own is made where torch can.
        timeout_s: within it all ranks have ended, counted from the begin of what does not end.
        on_end: called with the reason before this process ends by the watchdog.
        """
        self._store = store.clone() if hasattr(store, "clone") else store
        self._rank, self._size, self._timeout_s = rank, world_size, timeout_s
        self._activity, self._on_end = activity, on_end
        self._host = socket.gethostname()
        self._grace_s = min(MOST_GRACE_S, timeout_s / 5)
        self._tick_s = max(min(1.0, timeout_s / 40), world_size / RANKS_PER_S)
        # What is left of the time is for the alarm to be seen, and for all to speak.
        self._limit_s = max(timeout_s / 2, timeout_s - 2 * self._tick_s - 1.5 * self._grace_s)
        self._alarm: str | None = None  # why the job ends
        self._reporting, self._reported = threading.Lock(), threading.Event()
        self._stopping = threading.Event()
        self._wake: tuple[int, int] | None = None
        self._warned_of: float | None = None
        self._has_sigterm = False

    def start(self) -> None:
        """To be called in the main thread, which is where Python takes signals."""
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake = read, write
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._take_sigterm(write)
        for target in (self._watch, self._listen):
            threading.Thread(target=target, name=f"megatron_bfpp{target.__name__}", daemon=True).start()

    def stop(self) -> None:
        """In the main thread. From here on SIGTERM ends the process as it did before."""
        self._stopping.set()
        self._nudge()
        if self._has_sigterm:
            self._has_sigterm = False
            _leave_sigterm_alone()

    def failed(self, reason: str) -> None:
        """In the main thread: this rank ends with an error that nobody catches. All others end too."""
        self._within(self._grace_s, lambda: self._raise_alarm(f"rank {self._rank} {reason}"))
        if not self._report(reason):
            self._reported.wait(3 * self._grace_s)  # the other thread is at it, and ends the process

    def _take_sigterm(self, write: int) -> None:
        # Python's handlers run between two bytecodes of the main thread, which may stand in a wait for ever. The byte is
        # written by the C handler.
        previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        if previous != -1:  # somebody else listens to signals already
            signal.set_wakeup_fd(previous)
            return
        signal.signal(signal.SIGTERM, _noted)
        self._has_sigterm = True
        os.register_at_fork(after_in_child=_leave_sigterm_alone)

    def _watch(self) -> None:
        assert self._wake is not None, "the pipe is made before the thread"
        read, _ = self._wake
        while not self._stopping.is_set():
            select.select([read], [], [], self._tick_s)
            signals = _drained(read)
            if self._stopping.is_set():
                return
            if self._alarm is not None:
                self._take_along(self._alarm, 1)
            elif signal.SIGTERM in signals:
                self._within(self._grace_s, self._look)  # it may be that of the launcher, for what another rank did
                self._take_along(self._alarm or "SIGTERM", TERMINATED)
            else:
                self._check_time()

    def _check_time(self) -> None:
        activity = self._activity
        if not activity.is_timed:
            return
        since = activity.since
        seconds = time.monotonic() - since
        if seconds > self._limit_s:
            status = activity.status(self._rank, self._host)
            allowed = f"--bfpp-timeout-seconds {self._timeout_s:g} allows no more"
            why = f"rank {self._rank} has been for {seconds:.0f} s in {status.doing}; {allowed}"
            self._within(self._grace_s, lambda: self._raise_alarm(why))
            self._take_along(self._alarm or why, 1)
        elif seconds > self._limit_s / 2 and since != self._warned_of:
            self._warned_of = since
            status = activity.status(self._rank, self._host)
            print(
                f"megatron_bfpp: WARNING: {status}; the job ends after {self._timeout_s:g} s",
                file=sys.stderr,
                flush=True,
            )

    def _listen(self) -> None:
        while not self._stopping.wait(self._tick_s):
            try:
                self._look()
            except RuntimeError:  # torch.distributed.DistStoreError, DistNetworkError
                # Its host has ended, as at the end of every job; or has died, and then this rank's own time runs out.
                return
            if self._alarm is not None:
                self._nudge()
                return

    def _look(self) -> None:
        if self._alarm is None and self._store.check(["alarm"]):
            self._alarm = self._store.get("alarm").decode()

    def _raise_alarm(self, why: str) -> None:
        """The first alarm counts."""
        self._alarm = self._store.compare_set("alarm", "", why).decode()

    def _take_along(self, why: str, code: int) -> None:
        if self._report("", why):
            self._exit(code)
        else:
            self._reported.wait(3 * self._grace_s)

    def _report(self, ended: str, why: str = "") -> bool:
        """Say what this rank was doing, once; False if that is done or under way already. ended: why by itself."""
        if not self._reporting.acquire(blocking=False):
            return False
        status = self._activity.status(self._rank, self._host, ended)
        self._within(self._grace_s / 2, lambda: self._store.set(f"status/{self._rank}", json.dumps(status)))
        text = f"megatron_bfpp: {status}\n  {'it' if ended else 'the job'} ends: {ended or why}"
        print(text, file=sys.stderr, flush=True)
        if self._rank <= 1:
            self._gather(self._alarm or ended or why)
        if self._on_end is not None:
            self._on_end(self._alarm or ended or why)
        self._reported.set()
        return True

    def _gather(self, why: str) -> None:
        """The first rank prints what all have said; the second if the first one says nothing."""
        found: dict[int, Status] = {}

        def read() -> None:
            missing = set(range(self._size))
            while missing:
                for rank in sorted(missing):
                    if self._store.check([f"status/{rank}"]):
                        found[rank] = Status(*json.loads(self._store.get(f"status/{rank}")))
                        missing.discard(rank)
                        if self._rank == 1 and rank == 0:
                            return
                time.sleep(0.05)

        self._within(self._grace_s, read)
        if self._rank == 0 or 0 not in found:
            print(summary(why, dict(found), self._size), file=sys.stderr, flush=True)

    def _within(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something with the store, which may not answer: its host may be what has stopped."""

        def attempt() -> None:
            try:
                action()
            except RuntimeError as error:
                if not self._stopping.is_set():
                    print(
                        f"megatron_bfpp: the store of the ranks does not answer: {error}", file=sys.stderr, flush=True
                    )

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(seconds)

    def _nudge(self) -> None:
        if self._wake is not None:
            try:
                os.write(self._wake[1], b"\0")
            except BlockingIOError:  # it is full, which wakes as well
                return

    def _exit(self, code: int) -> None:
        """The main thread stands in a wait that nothing ends: only the whole process can."""
        for child in multiprocessing.active_children():  # of data loaders and checkpoints; nobody else would end them
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _noted(*_: object) -> None:
    """The byte in the pipe is what counts."""


def _leave_sigterm_alone() -> None:
    """Also in a forked child, which has neither the threads nor the reason, and shares the pipe."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _drained(read: int) -> bytes:
    try:
        return os.read(read, 512)
    except BlockingIOError:
        return b""
