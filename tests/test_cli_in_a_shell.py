"""What a newcomer's shell does to a command: full disks, pipes, unknown flags, Ctrl-C, files that cannot be written."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bfpp.cli import main

ROOT = Path(__file__).resolve().parents[1]
SHOW = ["show", "--pp", "4", "--chunks", "2", "--microbatches", "4"]


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [(">/dev/full", 2, "bfpp show: cannot write: No space left on device."), (">&-", 0, "")],
)
def test_output_that_cannot_be_printed_is_no_fault_of_the_program(redirection, code, said):
    command = f"{shlex.join([sys.executable, '-m', 'megatron_bfpp.cli', *SHOW])} {redirection}"
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert done.stderr.startswith(said) and len(done.stderr.splitlines()) <= 3


def test_a_file_may_be_the_standard_output_that_a_pipe_reads():
    command = [sys.executable, "-m", "megatron_bfpp.cli", *SHOW, "--csv", "/dev/stdout"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and "\n0F0," in "\n" + done.stdout


def test_an_unknown_flag_leads_to_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*SHOW, "--gruop-size", "3"])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("bfpp show: unrecognized arguments: --gruop-size") and "bfpp show --help" in said


def test_a_full_disk_is_not_mistaken_for_a_missing_folder(capsys):
    assert main([*SHOW, "--csv", "/dev/full"]) == 2
    assert "No space left on device.\n  Make room" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_says_so_without_a_traceback(number, monkeypatch, capsys):
    monkeypatch.setattr("megatron_bfpp.schedule.formats.read", lambda path: os.kill(os.getpid(), number))
    assert main(["check", "plan.csv"]) == 128 + number
    assert capsys.readouterr().err == f"bfpp check: stopped by {number.name}.\n"


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "configs/gpt_52b.yaml", "--gpu", "h100-80", "--gpus", "64", "--global-batch", "64,128"],
        ["bench", "--shape", "4,2,4"],
        ["check", "configs/gpt_52b_64_v100.yaml"],
        ["doctor"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, tmp_path, monkeypatch, capsys):
    for work in (
        "megatron_bfpp.planner.command.search",
        "megatron_bfpp.bench.command._measure",
        "megatron_bfpp.check.command.examine_ranks",
        "megatron_bfpp.doctor.facts.gather",
    ):
        monkeypatch.setattr(work, None)
    monkeypatch.chdir(ROOT)
    for path in (tmp_path, tmp_path / "missing" / "file.json"):
        assert main([*command, "--json", str(path)]) == 2
        assert f"--json {path} cannot be written: " in capsys.readouterr().err
    if command[0] in ("plan", "bench"):
        assert main([*command, "--plot", str(tmp_path / "picture.xyz")]) == 2
        assert "xyz is no format of matplotlib" in capsys.readouterr().err


def test_a_stop_while_the_command_is_still_imported_says_so_too(monkeypatch, capsys):
    monkeypatch.setattr("megatron_bfpp.cli.import_module", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "bfpp plan: stopped by SIGINT.\n"
