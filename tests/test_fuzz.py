"""No command line and no file ends in a traceback, a hang, a half-written file or more than three lines of error.

BFPP_ALL_CASES=1 runs thousands of cases, the default some hundreds. See fuzz.py.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import fuzz
import fuzz_words
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ALL = os.environ.get("BFPP_ALL_CASES") == "1"
CASES = {"show": 80, "plan": 80, "check": 80, "compare": 60, "trace": 60, "bench": 60, "doctor": 15, "nothing": 15}
MORE = 15  # times as many with BFPP_ALL_CASES=1


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_no_command_line_and_no_file_ends_in_a_traceback_or_half_a_file(command, monkeypatch):
    fuzz.stop_before_processes(monkeypatch.setattr)
    codes = Counter()

    @given(st.randoms(use_true_random=False))  # hypothesis makes, and shrinks, each of its choices
    @settings(
        deadline=None,
        max_examples=CASES[command] * (MORE if ALL else 1),
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def holds(rng):
        code, complaint = fuzz.run_case(command, rng)
        codes[code] += 1
        assert not complaint, complaint

    holds()
    # Both what is good and what is not were met; commands that were stopped before their processes end with 2.
    assert codes[2] > 0 and (codes[0] > 0 or command in ("bench", "doctor", "nothing")), codes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_case_of_each_command_as_a_process(seed, tmp_path):
    """Of those that start none themselves: what is seen in-process is what a shell sees."""
    for name in ("show", "plan", "check", "compare", "trace"):
        folder = tmp_path / name
        folder.mkdir()
        fuzz.prepare(folder)
        words = fuzz_words.COMMANDS[name](random.Random(seed), folder)
        if (name == "check" and "--config" in " ".join(words)) or any("\0" in word for word in words):
            continue
        command = [sys.executable, "-m", "megatron_bfpp.cli", *words]
        done = subprocess.run(
            command, check=False, capture_output=True, cwd=folder, timeout=240, stdin=subprocess.DEVNULL
        )
        err = done.stderr.decode("utf-8", "replace")
        assert not fuzz.complaint(folder, done.returncode, "", err), (words, err)


@pytest.mark.slow
def test_jobs_refuse_a_bad_command_line_in_at_most_three_lines(tmp_path):
    pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
    count = 1000 if ALL else 25
    command = [
        sys.executable,
        "-W",
        "ignore",
        fuzz.__file__.replace("fuzz.py", "fuzz_jobs.py"),
        "0",
        str(count),
        str(tmp_path),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60 * count)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == count
    wrong = [complaint for _, _, _, complaint in results if complaint]
    assert not wrong, "\n".join(wrong[:3])
    told = Counter((kind, what) for _, kind, what, _ in results)
    assert (
        told["pretrain_gpt", "accepted"] > 0
        and told["pretrain_gpt", "refused by us"] > 0
        and told["run", "refused by us"] > 0
    ), told
