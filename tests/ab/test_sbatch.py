"""The sbatch scripts, unmodified, on a real SLURM of two nodes: the quickstart's GPT, PP 4 as two ranks per node."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from cluster import free_ports

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 600  # for what takes a minute on an idle machine with 2 cores


def settings_of(text, folder):
    """What the quickstart's GPT needs on a CPU. All else is the scripts' default."""
    return {
        "CONFIG": "configs/quickstart.yaml", "DATA_PATH": text, "OUTPUT_PATH": str(folder / "out"),
        "GPUS_PER_NODE": "2", "DEVICE": "cpu", "PYTHON": sys.executable,
    }  # fmt: skip


@pytest.fixture
def submit(cluster, text, tmp_path):
    """submit(script, *options of sbatch, **settings): the job's number. Its output is in tmp_path / "job.out"."""

    def submitted(script, *options, **settings):
        needed = settings_of(text, tmp_path) | {
            # Two nodes of one machine: their names mean nothing to it.
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]),
        }  # fmt: skip
        words = ("sbatch", "--parsable", "--nodes=2", f"--chdir={ROOT}", f"--output={tmp_path / 'job.out'}", *options)
        return cluster.run(*words, str(ROOT / "scripts" / script), **needed | settings).strip()

    yield submitted
    cluster.run("scancel", "--state=RUNNING")
    cluster.run("scancel", "--state=PENDING")


def ended(cluster, job, tmp_path):
    """The job's state, once it has ended."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    cluster.wait_for(lambda: cluster.state(job)["JobState"] in ends, TIMEOUT_S, log=tmp_path / "job.out")
    return cluster.state(job)


def steps_of(folder):
    path = folder / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_ab_is_requeued_loses_an_arm_and_goes_on_where_it_stopped(cluster, submit, tmp_path):
    out, log = tmp_path / "out", tmp_path / "job.out"
    settings = {"ARMS": "interleaved breadth-first interleaved-grouped", "ROUNDS": "1", "STEPS": "8"}
    job = submit("ab_throughput.sbatch", **settings)
    cluster.wait_for(lambda: steps_of(out / "breadth-first.1"), TIMEOUT_S, job, log)
    first = (out / "interleaved.1" / "end.json").read_bytes()
    cluster.run("scontrol", "requeue", job)  # in the middle of the second arm
    # After the restart the second arm runs anew, and in the third one somebody cancels its step.
    cluster.wait_for(lambda: steps_of(out / "interleaved-grouped.1"), TIMEOUT_S, job, log)
    steps = cluster.run("squeue", "--steps", "--noheader", "--format=%i", f"--jobs={job}").split()
    cluster.run("scancel", *(step for step in steps if step.partition(".")[2].isdigit()))
    state, said = ended(cluster, job, tmp_path), log.read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "1:0", "1"), said
    assert "interleaved.1 has finished before: skipped" in said and (out / "unfinished" / "breadth-first.1-1").is_dir()
    assert (out / "interleaved.1" / "end.json").read_bytes() == first
    report = json.loads((out / "report.json").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert list(arms) == ["interleaved", "breadth-first", "interleaved-grouped"] and not report["good"]
    assert [len(arm["failures"]) for arm in arms.values()] == [0, 0, 1]
    assert "killed" in arms["interleaved-grouped"]["failures"][0]
    assert arms["breadth-first"]["step_s_p50"] > 0
    assert "breadth-first: bit-identical over 8 common steps" in said
    for arm in ("interleaved", "breadth-first"):
        log_of_arm = (out / "logs" / f"{arm}.1.log").read_text()
        assert (len(steps_of(out / f"{arm}.1")) == 8 and "PP 4 x 2 chunks" in log_of_arm) or arm == "interleaved"
    # Submitted again, only what has not finished runs.
    state, said = ended(cluster, submit("ab_throughput.sbatch", **settings), tmp_path), log.read_text()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert said.count("has finished before: skipped") == 3 and (out / "unfinished" / "interleaved-grouped.1-1").is_dir()
    assert "interleaved-grouped: bit-identical over 8 common steps" in (out / "report.md").read_text()
    assert json.loads((out / "report.json").read_text())["good"]


def test_a_training_that_is_requeued_goes_on_from_its_last_checkpoint(cluster, submit, tmp_path):
    out, log = tmp_path / "out", tmp_path / "job.out"
    saved = out / "checkpoints" / "latest_checkpointed_iteration.txt"
    job = submit("pretrain_52b.sbatch", STEPS="24", SAVE_INTERVAL="4", PIPELINE_SCHEDULE="breadth-first")
    cluster.wait_for(saved.exists, TIMEOUT_S, job, log)
    cluster.run("scontrol", "requeue", job)
    state, said = ended(cluster, job, tmp_path), log.read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    loaded = re.findall(r"successfully loaded checkpoint .* at iteration (\d+)", said)
    assert loaded and int(loaded[-1]) % 4 == 0 and 4 <= int(loaded[-1]) < 24
    assert saved.read_text() == "24" and json.loads((out / "run" / "end.json").read_text())["status"] == "finished"
    losses = {}
    for step in steps_of(out / "run"):  # a step that ran twice, before and after the restart, gave the same bits
        assert losses.setdefault(step["step"], step["lm loss hex"]) == step["lm loss hex"]
    assert sorted(losses) == list(range(1, 25)) and len(set(losses.values())) > 12


@pytest.mark.parametrize("script", ["ab_throughput.sbatch", "pretrain_52b.sbatch"])
def test_what_a_dry_run_prints_is_accepted_by_slurm(script, cluster, text, tmp_path):
    settings = settings_of(text, tmp_path) | {"NNODES": "2"}
    path = ROOT / "scripts" / script
    printed = cluster.run("bash", str(path), "--dry-run", **settings)
    commands = re.findall(r"would run: (srun .*)", printed)
    assert len(commands) == (12 if script.startswith("ab") else 1)
    head = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    job = tmp_path / "job.sh"
    job.write_text("\n".join(["#!/usr/bin/env bash", *head, *commands]) + "\n")
    for submitted in (job, path):
        assert "to start at" in cluster.run("sbatch", "--test-only", "--nodes=2", str(submitted), **settings)
    # Its options are srun's own.
    assert "to start at" in cluster.run("srun", "--test-only", *shlex.split(commands[0])[1:])
    assert not (tmp_path / "out").exists()
