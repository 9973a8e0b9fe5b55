"""The one launcher of ranks and commands: each runs in a session of its own, and all are ended, whatever interrupts
this process. Standard library only."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

__all__ = ["Forked", "Ranks", "Stopped", "first_error", "free_port", "marked", "package_on_path", "rank_environment",
           "stoppable"]  # fmt: skip

_PAUSE_S = 0.1
_PORTS = 12_000  # below those of outgoing connections
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError")
# Behind the labels of torchrun ("[rank3]: ") and srun ("3: "). torchrun's summary, a ChildFailedError, names no error.
_ERROR = re.compile(
    r"(\[?[a-z]*[0-9]+\]?: *)*(?!\S*ChildFailedError)"
    r"([A-Za-z_.]*(Error|Exception)|megatron_bfpp: (error|rank [0-9]+ is refused))\b"
)
# A rank that was left alone names a lost connection, often before the one that failed has printed why.
_CAUSE = re.compile(rf"(?!.*Connection (closed by peer|reset by peer|refused)){_ERROR.pattern}")


class Process(Protocol):
    """The part of subprocess.Popen that Ranks needs."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> Any: ...


class Forked:
    """A started multiprocessing.Process with the interface of subprocess.Popen."""

    def __init__(self, process: Any):
        self._process, self.pid = process, int(process.pid)

    def poll(self) -> int | None:
        """Return its exit code, -N where signal N killed it, None while it runs."""
        return self._process.exitcode  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.join()


class Ranks:
    """Processes that run together; leaving the `with` block ends those that still run, and what they have started.

        with Ranks() as ranks:
            ranks.start([sys.executable, "train.py"], log, environment)
            codes = ranks.wait(timeout_s=60)

    grace_s: seconds between SIGTERM and SIGKILL; 0 for SIGKILL at once.
    """

    def __init__(self, grace_s: float = 0.0):
        self.grace_s = grace_s
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self, command: Sequence[str], log: Path | None, environment: Mapping[str, str] | None = None) -> None:
        """Start a command in a session of its own; append its output to `log`, None for that of this process."""
        with open(log, "ab") if log else contextlib.nullcontext() as output:
            errors = subprocess.STDOUT if log else None
            self.add(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment,
                                      start_new_session=True))  # fmt: skip

    def add(self, process: Process) -> None:
        """Watch and end a process that was started elsewhere."""
        self._processes.append(process)

    def codes(self) -> list[int | None]:
        """Return the exit codes in the order of the starts: -N for an end by signal N, None for one that runs."""
        return [process.poll() for process in self._processes]

    def kill(self, place: int) -> None:
        """Kill one of them, by its place among the starts, with all that it has started."""
        os.killpg(self._processes[place].pid, signal.SIGKILL)

    def wait(
        self, timeout_s: float = float("inf"), linger_s: float = 1.0, on_wait: Callable[[], None] = lambda: None
    ) -> list[int | None]:
        """Wait until all have ended, or one has failed, or the time is over; return the exit codes.

        linger_s: after a failure the others have this long to report more than a lost peer. on_wait: called ten times
        a second.
        """
        deadline = time.monotonic() + timeout_s
        while None in (codes := self.codes()) and time.monotonic() < deadline:
            if any(codes):
                deadline = min(deadline, time.monotonic() + linger_s)
                linger_s = float("inf")  # the first failure counts
            on_wait()
            time.sleep(_PAUSE_S)
        return codes

    def end(self) -> None:
        """End what still runs: SIGTERM, SIGKILL after grace_s. An exception meanwhile comes to SIGKILL at once."""
        try:
            if self.grace_s and None in self.codes():
                self._signal(signal.SIGTERM)
                deadline = time.monotonic() + self.grace_s
                while None in self.codes() and time.monotonic() < deadline:
                    time.sleep(_PAUSE_S)
        finally:
            self._signal(signal.SIGKILL)
            for process in self._processes:
                process.wait()

    def _signal(self, number: int) -> None:
        for process in self._processes:
            # A process group outlives its leader. A forked process may lead none.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


class Stopped(SystemExit):
    """A signal asked this process to end; the code is that of a shell, 128 and the signal's number."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let the first SIGTERM or SIGINT raise Stopped, so that every `finally` runs; further ones are ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def first_error(log: Path) -> str:
    """Return the first line of a log that names an error; "" without one.

    A line of lacking memory comes before all others, one of a lost connection behind them.
    """
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for pattern in (_OUT_OF_MEMORY.search, _CAUSE.match, _ERROR.match):
        for line in lines:
            if pattern(line):
                return line.strip()
    return ""


def marked(mark: str) -> dict[int, str]:
    """Return the processes whose environment has the entry `mark` (NAME=VALUE): process id -> its environment.

    Ranks of torchrun are in sessions of their own, and outlive a torchrun that is killed; their environment names them.
    Entries are separated, preceded and followed by zero characters.
    """
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            environment = f"\0{path.read_bytes().decode(errors='replace')}\0"
            if f"\0{mark}\0" in environment:
                found[int(path.parent.name)] = environment
    return dict(sorted(found.items()))


def end_marked(mark: str) -> None:
    """Kill the processes whose environment has the entry `mark`."""
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank of one node, with one thread each."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def package_on_path() -> str:
    """Return a PYTHONPATH with which other processes import this package, also where it is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def free_port() -> int:
    """Return a TCP port of the loopback that nothing uses now.

    It is one below those that Linux gives to outgoing connections, of which a job makes hundreds: one of these could
    otherwise take it before it is used.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 0
    below = range(max(first - _PORTS, 10_000), first)
    # Other than those that a forked process would draw, whose random numbers are the same.
    for port in random.SystemRandom().sample(below, min(len(below), 20)):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
