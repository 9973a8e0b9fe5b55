"""One random case of bfpp, and what must hold of how it ends.

test_fuzz.py lets hypothesis make every choice, which shrinks a failure to the least command line and the least damage
that show it. `python tests/support/fuzz.py COMMAND FIRST LAST` runs many cases, each made from its seed.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from xml.etree import ElementTree

from fuzz_words import COMMANDS

from megatron_bfpp import cli
from megatron_bfpp.console.errors import UserError

CPU_LIMIT_S, LIMIT_S, MEMORY = 30, 240, 4 << 30  # a case takes 0.02 s; other jobs may hold the machine
BEFORE = "what stood here before"


class Late(BaseException):
    """A case took too long. No Exception, so that nothing under test can swallow it."""


class Stopped(UserError):
    """Where a case would start processes or train: the command line was accepted."""


@contextlib.contextmanager
def limited():
    """Late after the limits of time; MemoryError beyond the one of memory."""

    def stop(number, frame):
        raise Late

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in handlers.items():
            signal.signal(number, handler)


def prepare(folder):
    """Files to be written over, and places that cannot be written to."""
    (folder / "folder").mkdir()
    for ending in ("svg", "html", "csv", "json", "md", "png", "xyz"):
        (folder / f"before.{ending}").write_text(BEFORE)
        (folder / f"dangling.{ending}").symlink_to(f"target.{ending}")
    (folder / "loop").symlink_to("loop")


def call(words):
    """Exit code, standard output and error of bfpp; what escapes is a fault."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    stdin = io.TextIOWrapper(io.BytesIO(b"0F0,0B0\n"), "utf-8")
    saved = sys.stdin
    try:
        sys.stdin = stdin
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), limited():
            try:
                code = cli.main(words)
            except SystemExit as stop:
                code = stop.code
            sys.stdout.flush()
    finally:
        sys.stdin = saved
    return code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams if not stream.flush())


def is_whole(path):
    """Whether a file is one of bfpp's outputs from its first to its last byte."""
    data = path.read_bytes()
    if path.suffix == ".json":
        json.loads(data)
    elif path.suffix == ".svg":
        ElementTree.fromstring(data)
    elif path.suffix == ".html":
        return data.rstrip().endswith(b"</html>")
    elif path.suffix in (".png", ".xyz"):
        return data.startswith(b"\x89PNG") and b"IEND" in data[-16:]
    return data.endswith((b"\n", b"IEND\xaeB`\x82", b"</svg>", b"</html>"))


def complaint(folder, code, out, err):
    """What is wrong with how a case ended; "" if nothing."""
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in err:
        return "a traceback"
    if code == 2 and not 1 <= len(err.splitlines()) <= 3:
        return f"{len(err.splitlines())} lines of error"
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".bfpp"):
            return f"{path.name} is left over"
        if (
            path.name.startswith(("new", "before", "target"))
            and path.is_file()
            and path.read_bytes() != BEFORE.encode()
            and not is_whole(path)
        ):
            return f"{path.name} is half written"
    return ""


def run_case(name, rng):
    """Run a case; return (exit code, complaint). rng makes all choices: a random.Random, or hypothesis in its place."""
    here = os.getcwd()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    words, code, out, err = ["?"], None, "", ""
    try:
        os.chdir(folder)
        prepare(folder)
        words = COMMANDS[name](rng, folder)
        code, out, err = call(words)
        wrong = complaint(folder, code, out, err)
    except (Exception, Late):  # whatever escapes is what is looked for
        wrong = traceback.format_exc(limit=-8)
    finally:
        os.chdir(here)
        shutil.rmtree(folder, ignore_errors=True)
    return code, f"{name}: bfpp {words!r:.2000}\n{wrong}\n{err[-2000:]}" if wrong else ""


def stop_before_processes(patch):
    """Where commands would start processes they end instead: patch(owner, name, value)."""
    from megatron_bfpp.bench import command as bench
    from megatron_bfpp.check import command as dry_run
    from megatron_bfpp.doctor import facts as doctor_facts

    def stopped(*args, **kwargs):
        raise Stopped("the command line was accepted")

    patch(bench, "_measure", stopped)
    patch(dry_run, "examine_ranks", stopped)
    patch(doctor_facts, "gather", stopped)


if __name__ == "__main__":
    stop_before_processes(setattr)
    first = int(sys.argv[2])
    faults = [
        f"{seed}: {found}"
        for seed in range(first, int(sys.argv[3]) if len(sys.argv) > 3 else first + 1)
        if (found := run_case(sys.argv[1], random.Random(f"{sys.argv[1]} {seed}"))[1])
    ]
    print(*faults[:8], f"{len(faults)} faults", sep="\n")
