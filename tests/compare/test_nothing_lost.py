"""An arm is killed, a disk is full, a directory is gone, a log is cut off: the report says so, all else is whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ab_runs import compared, make_run, two_arms

from megatron_bfpp.cli import main
from megatron_bfpp.console.errors import UserError
from megatron_bfpp.console.files import write_whole

ROOT = Path(__file__).parents[2]
FILLER = "filler"  # a file that takes all the room there is


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small tmpfs needs Linux and root")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, free: int = 0) -> Path:
    """Leave about `free` bytes, a number of whole pages."""
    path = folder / FILLER
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            file.truncate(max(0, file.tell() // 4096 * 4096 - free))
    return path


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_file_stays_as_it_was_where_the_new_one_does_not_fit(disk):
    path = disk / "trace.json"
    write_whole(str(path), "old", "--bfpp-trace-steps")
    fill(disk, free=8192)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_whole(str(path), "new" * 100_000, "--bfpp-trace-steps")
    assert path.read_text() == "old" and sorted(each.name for each in disk.iterdir()) == [FILLER, "trace.json"]


def test_a_run_on_a_full_disk_trains_on_and_keeps_the_steps_before_and_after(disk, monkeypatch, capsys):
    pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
    from megatron_bfpp.integration.observe import run_files
    from megatron_bfpp.integration.process import write_or_warn

    monkeypatch.setattr(run_files, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    template = make_run(disk.parent, "1f1b", steps=3)
    lines = [json.loads(line) | {"padding": "x" * 3000} for line in (template / "steps.jsonl").read_text().splitlines()]
    run = run_files.Run(str(disk / "1f1b.1"))
    shutil.copy(template / "run.json", run.folder)
    trace = str(run.folder / "trace.json")
    run.add(1, lines[0])
    write_or_warn(trace, "a whole trace", "--bfpp-trace-steps")
    filler = fill(disk)
    run.add(2, lines[1])
    write_or_warn(trace, "another trace" * 1000, "--bfpp-trace-steps")
    told = capsys.readouterr().out
    assert "WARNING: step 2 is missing in" in told and "WARNING: --bfpp-trace-steps" in told
    assert Path(trace).read_text() == "a whole trace"
    run.end("OSError: no room")
    assert "end.json cannot be written" in capsys.readouterr().out and not (run.folder / "end.json").exists()
    filler.unlink()
    run.add(3, lines[2])
    run.end()
    assert [json.loads(line)["step"] for line in (run.folder / "steps.jsonl").read_text().splitlines()] == [1, 3]
    assert "1f1b.1: end.json counts 3 steps, steps.jsonl has 2" in compared(run.folder).notes
    assert not [each for each in run.folder.iterdir() if each.name.startswith(".")]


def test_a_report_that_does_not_fit_leaves_the_one_before_and_is_told_in_full_on_the_terminal(disk, capsys):
    paths = [str(path) for path in two_arms(disk.parent / "runs")]
    files = {kind: disk / f"report.{kind}" for kind in ("html", "markdown", "json")}
    words = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main(["compare", *paths, *words]) == 0
    before = contents(disk)
    filler = fill(disk)
    capsys.readouterr()
    assert main(["compare", *paths, *words, "--warmup", "7"]) == 2
    told = capsys.readouterr()
    assert f"--html {files['html']} cannot be written: No space left on device" in told.err
    assert "bit-identical over 20 common steps" in told.out
    filler.unlink()
    assert contents(disk) == before


# A trainer for the A/B scripts: as much of torchrun and a rank as matters here. The rank lives in a session of its own.
TORCHRUN = """
import os, subprocess, sys
sys.exit(subprocess.run([sys.executable, os.environ["RANK_SCRIPT"], *sys.argv[1:]], start_new_session=True).returncode)
"""
RANK = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, os.environ["TESTS"])
from ab_runs import END, make_run

folder, arm, round_ = Path(os.environ["BFPP_RUN_DIR"]), os.environ["BFPP_ARM"], int(os.environ["BFPP_ROUND"])
if f"{arm}.{round_}" == os.environ.get("FILLS"):
    with open(folder.parent / "filler", "wb", buffering=0) as file:
        while file.write(b"x" * 4096): pass
folder.rmdir()  # make_run makes it
make_run(folder.parent, arm, round_, steps=8, end=None)
if f"{arm}.{round_}" == os.environ.get("HANGS"):
    (folder / "rank").write_text(str(os.getpid()))
    time.sleep(300)
(folder / "end.json").write_text(json.dumps({**END, "steps": 8}))
"""


@pytest.fixture
def ab(tmp_path):
    """ab(out, **settings): ab_local.sh under way, of three arms in one round, with that trainer."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    python = (
        f'#!/usr/bin/env bash\nif [[ " $* " == *" torch.distributed.run "* ]]; then exec {sys.executable} '
        f'"{stubs}/torchrun.py" "$@"; fi\nexec {sys.executable} "$@"\n'
    )
    for name, content in (("python", python), ("torchrun.py", TORCHRUN), ("rank.py", RANK)):
        (stubs / name).write_text(content)
    (stubs / "python").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_", "BFPP_"))}
    fixed = {
        "PYTHON": str(stubs / "python"), "RANK_SCRIPT": str(stubs / "rank.py"),
        "TESTS": str(ROOT / "tests" / "support"), "DATA_PATH": "text", "ROUNDS": "1", "STEPS": "8",
        "ARMS": "interleaved breadth-first interleaved-grouped",
    }  # fmt: skip

    def start(out, **settings):
        environment = kept | fixed | {"OUTPUT_PATH": str(out), **settings}
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "ab_local.sh")], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def ended(script) -> tuple[int, str]:
    said = script.communicate(timeout=300)[0]
    return script.returncode, said


@pytest.mark.slow
def test_killing_the_torchrun_of_an_arm_takes_its_ranks_along_and_leaves_the_others_whole(ab, tmp_path):
    out = tmp_path / "out"
    script = ab(out, HANGS="breadth-first.1")
    mark = out / "breadth-first.1" / "rank"
    deadline = time.monotonic() + 120
    while not (mark.exists() and mark.read_text()):
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    rank = int(mark.read_text())
    parent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    before = contents(out / "interleaved.1")
    os.kill(parent, signal.SIGKILL)
    code, said = ended(script)
    assert code == 1 and "breadth-first.1 FAILED: killed by signal 9" in said, said
    assert not Path(f"/proc/{rank}").exists() or "Z" in Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2]
    assert contents(out / "interleaved.1") == before
    end = json.loads((out / "breadth-first.1" / "end.json").read_text())
    assert end["status"] == "failed" and end["reason"].startswith("killed by signal 9")
    report = json.loads((out / "report.json").read_text())
    assert [len(arm["failures"]) for arm in report["arms"]] == [0, 1, 0]
    assert "breadth-first.1: killed by signal 9" in (out / "report.md").read_text()
    assert "0 of 1: killed" in (out / "report.html").read_text()


@pytest.mark.slow
def test_an_ab_on_a_full_disk_says_so_keeps_the_finished_arms_and_goes_on_later(ab, disk):
    code, said = ended(ab(disk, FILLS="breadth-first.1"))
    assert code == 2 and "No space left on device" in said, said
    assert "breadth-first.1" in said.partition("Did not finish:")[2]
    assert "interleaved-grouped.1" in said.partition("Did not finish:")[2]
    before = contents(disk / "interleaved.1")
    assert json.loads(before[disk / "interleaved.1" / "end.json"])["status"] == "finished"
    (disk / FILLER).unlink()
    code, said = ended(ab(disk))
    assert code == 0 and "interleaved.1 has finished before: skipped" in said, said
    assert contents(disk / "interleaved.1") == before and json.loads((disk / "report.json").read_text())["good"]


def test_a_directory_that_is_gone_is_a_row_of_the_report(tmp_path, capsys):
    one, two = two_arms(tmp_path)
    gone, empty = tmp_path / "breadth-first.2", make_run(tmp_path, "interleaved-grouped")
    shutil.rmtree(empty)
    empty.mkdir()
    before = contents(one, two)
    assert main(["compare", *map(str, (one, two, gone, empty)), "--json", str(tmp_path / "report.json")]) == 1
    told = capsys.readouterr().out
    assert f"breadth-first.2: its directory {gone} does not exist"[:150] in told
    assert f"interleaved-grouped.1: its directory {empty} holds no file of a run"[:150] in told
    arms = json.loads((tmp_path / "report.json").read_text())["arms"]
    assert [(arm["name"], arm["runs"], len(arm["failures"])) for arm in arms] == [
        ("1f1b", 1, 0), ("breadth-first", 2, 1), ("interleaved-grouped", 1, 1),
    ]  # fmt: skip
    assert arms[1]["ratio"] == pytest.approx(0.301 / 0.401) and contents(one, two) == before


def test_a_log_that_is_cut_off_is_told_and_costs_one_step(tmp_path, capsys):
    one, two = two_arms(tmp_path)
    log = two / "steps.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    assert main(["compare", str(one), str(two)]) == 0
    told = capsys.readouterr().out
    assert "breadth-first.1: the last line of steps.jsonl is cut off: skipped" in told
    assert "breadth-first.1: end.json counts 20 steps, steps.jsonl has 19" in told
    assert "bit-identical over 19 common steps" in told


def test_a_timeline_that_is_cut_off_is_told_and_the_others_are_shown(tmp_path):
    paths = two_arms(tmp_path)
    whole = "<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'></svg>\n"
    for path, content in zip(paths, (whole, whole[:-20]), strict=True):
        (path / "timeline.svg").write_text(content)
    page = tmp_path / "report.html"
    assert main(["compare", *map(str, paths), "--html", str(page)]) == 0
    shown = page.read_text()
    assert shown.count("<img ") == 1 and shown.count("timeline.svg is cut off: left out") == 1
