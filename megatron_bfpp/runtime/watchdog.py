"""Ends a job whose step does not end, and reports where every rank was.

Each rank has two threads. One watches this rank's `Activity`: an action that does not end within the time allowed is an
alarm. The other looks for alarms of other ranks in the store through which the ranks met at their start; it needs
neither NCCL nor gloo, whose operations may be what hangs. On an alarm every rank reports what it was doing and ends;
the first rank collects the reports. A rank without a report is dead or stopped.

Torchrun ends the ranks of a node by SIGTERM as soon as one of them has died, before they could report anything. That
signal is an alarm of this rank alone, unless somebody else handles it (Megatron's --exit-signal-handler).
"""

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

MOST_GRACE_S = 5.0  # how long the first rank waits for the other reports; less if the time allowed is short
RANKS_PER_S = 1024  # ranks that ask the store in a second; a TCPStore answers 100 times as many
TERMINATED = 128 + signal.SIGTERM


class Watchdog:
    """Watches one rank. Call `start`, `failed` for an error that nobody catches, and `stop` at the end."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout_s: float,
        activity: Activity,
        on_end: Callable[[str], None] | None = None,
    ):
        """store: the store in which the ranks met, with a prefix of this job; torch makes it a connection of its own.
        timeout_s: all ranks end within it, counted from the begin of the action that does not end.
        on_end: called with the reason before the watchdog ends this process.
        """
        self._store = store.clone() if hasattr(store, "clone") else store
        self._rank, self._size, self._timeout_s = rank, world_size, timeout_s
        self._activity, self._on_end = activity, on_end
        self._host = socket.gethostname()
        self._grace_s = min(MOST_GRACE_S, timeout_s / 5)
        self._tick_s = max(min(1.0, timeout_s / 40), world_size / RANKS_PER_S)
        # The rest of the time is for the ranks to see the alarm and to report.
        self._limit_s = max(timeout_s / 2, timeout_s - 2 * self._tick_s - 1.5 * self._grace_s)
        self._alarm: str | None = None  # the reason why the job ends
        self._reporting, self._reported = threading.Lock(), threading.Event()
        self._stopping = threading.Event()
        self._wake: tuple[int, int] | None = None
        self._warned_of: float | None = None
        self._has_sigterm = False

    def start(self) -> None:
        """Start the threads. Call it in the main thread, where Python takes signals."""
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake = read, write
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._take_sigterm(write)
        for target in (self._watch, self._listen):
            threading.Thread(target=target, name=f"megatron_bfpp{target.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Stop the threads and restore SIGTERM. Call it in the main thread."""
        self._stopping.set()
        self._nudge()
        if self._has_sigterm:
            self._has_sigterm = False
            _leave_sigterm_alone()

    def failed(self, reason: str) -> None:
        """End all ranks because this one ends with an error that nobody catches. Call it in the main thread."""
        self._within(self._grace_s, lambda: self._raise_alarm(f"rank {self._rank} {reason}"))
        if not self._report(reason):
            self._reported.wait(3 * self._grace_s)  # the other thread is reporting, and ends the process

    def _take_sigterm(self, write: int) -> None:
        # Python's handlers run between two bytecodes of the main thread, which may wait for ever. The C handler writes
        # the byte at once.
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
                self._within(self._grace_s, self._look)  # the launcher may have sent it because another rank failed
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
            allowed = f"{self._timeout_s:g} s with all reports (--bfpp-timeout-seconds, BFPP_TIMEOUT_SECONDS)"
            why = f"rank {self._rank} has been for {seconds:.0f} s in {status.doing}; it may take {allowed}"
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
                # The store's host has ended, as at the end of every job, or has died: then this rank's time runs out.
                return
            if self._alarm is not None:
                self._nudge()
                return

    def _look(self) -> None:
        if self._alarm is None and self._store.check(["alarm"]):
            self._alarm = self._store.get("alarm").decode()

    def _raise_alarm(self, why: str) -> None:
        """Raise the alarm, unless another rank was first."""
        self._alarm = self._store.compare_set("alarm", "", why).decode()

    def _take_along(self, why: str, code: int) -> None:
        if self._report("", why):
            self._exit(code)
        else:
            self._reported.wait(3 * self._grace_s)

    def _report(self, ended: str, why: str = "") -> bool:
        """Report what this rank was doing, once; False if a report is made already. ended: its own reason to end."""
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
        """Print all reports on the first rank, or on the second if the first has none."""
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
        """Run an action on the store for at most so long: the store's host may have stopped."""

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
            except BlockingIOError:  # a full pipe wakes the thread as well
                return

    def _exit(self, code: int) -> None:
        """End the process; the main thread is in a wait that nothing else ends."""
        for child in multiprocessing.active_children():  # data loaders and checkpoint writers, which nobody else ends
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _noted(*_: object) -> None:
    """Do nothing: the byte in the pipe wakes the thread."""


def _leave_sigterm_alone() -> None:
    """Restore SIGTERM, also in a forked child, which has no threads and shares the pipe."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _drained(read: int) -> bytes:
    try:
        return os.read(read, 512)
    except BlockingIOError:
        return b""
