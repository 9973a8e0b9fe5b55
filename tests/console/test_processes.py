"""Ranks are watched, ended with what they have started, and their logs are searched for the first error."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_bfpp.console import processes
from megatron_bfpp.console.processes import Ranks, first_error, free_port, marked, package_on_path

# A rank that ignores SIGTERM where it is asked to, and has started a process of its own.
RANK = """
import pathlib, signal, subprocess, sys, time
if "deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
other = subprocess.Popen(["sleep", "60"])
pathlib.Path(sys.argv[1]).write_text(str(other.pid))
time.sleep(60)
"""


def runs(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def started(path: Path) -> int:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


def test_exit_codes_come_in_the_order_of_the_starts_with_the_output_in_the_logs(tmp_path):
    with Ranks() as ranks:
        for code in (0, 3):
            command = [sys.executable, "-c", f"import os; print(os.environ['A']); exit({code})"]
            ranks.start(command, tmp_path / f"{code}.log", {**os.environ, "A": f"a{code}"})
        ranks.wait(60, linger_s=30)
        assert ranks.codes() == [0, 3]
    assert [(tmp_path / f"{code}.log").read_text() for code in (0, 3)] == ["a0\n", "a3\n"]


@pytest.mark.parametrize("grace_s, how, code", [(0.0, "", -signal.SIGKILL), (30.0, "", -signal.SIGTERM),
                                                (0.3, "deaf", -signal.SIGKILL)])  # fmt: skip
def test_leaving_the_block_ends_ranks_and_what_they_started(grace_s, how, code, tmp_path):
    with Ranks(grace_s) as ranks:
        ranks.start([sys.executable, "-c", RANK, str(tmp_path / "pid"), how], tmp_path / "log")
        other = started(tmp_path / "pid")
        assert ranks.wait(0.2) == [None]
    assert ranks.codes() == [code]
    deadline = time.monotonic() + 60
    while runs(other):
        assert time.monotonic() < deadline


def test_a_failure_ends_the_wait_after_the_others_could_speak(tmp_path):
    begin = time.monotonic()
    with Ranks() as ranks:
        ranks.start([sys.executable, "-c", "raise ValueError('no')"], tmp_path / "log")
        ranks.start(["sleep", "60"], tmp_path / "other.log")
        assert ranks.wait(60, linger_s=0.5) == [1, None]
    assert time.monotonic() - begin < 30 and first_error(tmp_path / "log") == "ValueError: no"


def test_a_signal_ends_the_ranks_and_gives_the_shells_exit_code(tmp_path):
    code = (
        "import sys; from pathlib import Path; from megatron_bfpp.console.processes import Ranks, stoppable\n"
        "with stoppable(), Ranks(30) as ranks:\n"
        "    ranks.start([sys.executable, '-c', *sys.argv[2:]], Path(sys.argv[1]))\n"
        "    ranks.wait()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log"), RANK, str(tmp_path / "pid")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": package_on_path(), "MARK": "1"}) as launcher:
        other = started(tmp_path / "pid")
        launcher.terminate()
        assert launcher.wait(30) == 143
    assert not runs(other)


@pytest.mark.parametrize(
    "lines, found",
    [
        (["step 1", "[rank1]: ValueError: one", "RuntimeError: two"], "[rank1]: ValueError: one"),
        (["ValueError: one", "3: OutOfMemoryError: CUDA out of memory"], "3: OutOfMemoryError: CUDA out of memory"),
        (["0: megatron_bfpp: error: --x", "torch.elastic.ChildFailedError: "], "0: megatron_bfpp: error: --x"),
        (["torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "], ""),
        (["[rank0]: RuntimeError: [pair.cc] Connection closed by peer [a]:1", "megatron_bfpp: rank 3 is refused: M"],
         "megatron_bfpp: rank 3 is refused: M"),
        (["[rank0]: RuntimeError: [pair.cc] Connection closed by peer [a]:1"],
         "[rank0]: RuntimeError: [pair.cc] Connection closed by peer [a]:1"),
        (["loss 0.1", "no error here"], ""),
    ],
)  # fmt: skip
def test_the_first_error_of_a_log(lines, found, tmp_path):
    (tmp_path / "log").write_text("\n".join(lines))
    assert first_error(tmp_path / "log") == found


def test_processes_are_found_by_their_environment():
    mark = f"BFPP_TEST_MARK={os.getpid()}"
    name, _, value = mark.partition("=")
    with subprocess.Popen(["sleep", "60"], env={**os.environ, name: value}) as process:
        try:
            found = marked(mark)
            assert list(found) == [process.pid] and f"\0{mark}\0" in found[process.pid]
        finally:
            process.kill()


def test_a_free_port_is_none_that_an_outgoing_connection_takes_nor_one_in_use(monkeypatch):
    outgoing = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if outgoing.exists():  # Linux; from 10,000 or less on, no others are left
        first = int(outgoing.read_text().split()[0])
        assert 10_000 <= free_port() < first or first <= 10_000
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        used = taken.getsockname()[1]
        monkeypatch.setattr(processes.random, "SystemRandom", lambda: SimpleNamespace(sample=lambda *given: [used]))
        assert free_port() not in (0, used)
