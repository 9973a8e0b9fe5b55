"""The A/B, with a trainer that only writes the files of a run, and stand-ins for the commands of SLURM."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ab_runs import compared, make_run

from megatron_bfpp.ab.job import ARMS
from megatron_bfpp.cli import main
from megatron_bfpp.console.config_file import cluster
from megatron_bfpp.console.errors import UserError
from megatron_bfpp.schedule.names import SCHEDULES

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
CONNECTIONS, GROUP = "CUDA_DEVICE_MAX_CONNECTIONS", "--microbatch-group-size-per-virtual-pipeline-stage"

# `python`: the trainer where torch.distributed.run is asked for, else the real one.
PYTHON = f"""#!/usr/bin/env bash
if [[ " $* " == *" torch.distributed.run "* ]]; then exec {sys.executable} "$STUBS/trainer.py" "$@"; fi
exec {sys.executable} "$@"
"""
TRAINER = """
import json, os, sys, time
sys.path.insert(0, os.environ["TESTS"])
from pathlib import Path
from ab_runs import END, make_run

words = sys.argv[1:]
value = lambda name: words[len(words) - 1 - words[::-1].index(name) + 1]
arm, round_ = os.environ["BFPP_ARM"], int(os.environ["BFPP_ROUND"])
folder = Path(value("--bfpp-run-dir"))
with open(os.environ["STUBS"] + "/calls", "a") as file:
    file.write(json.dumps([arm, round_, words, os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")]) + "\\n")
if arm == os.environ.get("HANGS"):
    Path(os.environ["STUBS"], "hanging").touch()
    time.sleep(60)
if arm == os.environ.get("FAILS"):
    print('[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate "2 GiB" \\\\ more', file=sys.stderr)
    sys.exit(1)
folder.rmdir()  # make_run makes it
make_run(folder.parent, arm, round_, steps=int(value("--train-iters")), end=END)
"""
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$STUBS/sruns"
while [[ "$1" == --* ]]; do
    if [[ "$1" == --container-* ]]; then shift; fi
    shift
done
SLURM_NODEID=0 exec "$@"
"""
# More than a pipe holds: whoever reads only the first line would end it with SIGPIPE.
SCONTROL = '#!/usr/bin/env bash\nset -e\nfor ((i = 1; i <= 20000; i++)); do echo "node$i"; done\n'


@pytest.fixture
def stubs(tmp_path):
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, content in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL), ("trainer.py", TRAINER)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return folder


def environment(stubs, **settings):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_", "BFPP_"))}
    return kept | {
        "PATH": f"{stubs}:{os.environ['PATH']}", "PYTHON": str(stubs / "python"), "STUBS": str(stubs),
        "DATA_PATH": "text", "TESTS": str(ROOT / "tests" / "support"), "STEPS": "8",
        "OUTPUT_PATH": str(stubs.parent / "out"), **settings,
    }  # fmt: skip


def run(script, stubs, *words, **settings):
    command = ["bash", str(SCRIPTS / script), *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, env=environment(stubs, **settings)
    )


def calls(stubs):
    path = stubs / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_arms_alternate_and_a_failing_one_is_a_row_of_the_report(stubs):
    done = run("ab_local.sh", stubs, ARMS="1f1b breadth-first interleaved-grouped", ROUNDS="2", FAILS="breadth-first")
    out = stubs.parent / "out"
    assert done.returncode == 1, done.stderr
    order = [(arm, round_) for arm, round_, *_ in calls(stubs)]
    assert order == [
        ("1f1b", 1), ("breadth-first", 1), ("interleaved-grouped", 1),
        ("breadth-first", 2), ("interleaved-grouped", 2), ("1f1b", 2),
    ]  # fmt: skip
    end = json.loads((out / "breadth-first.1" / "end.json").read_text())
    assert end["status"] == "failed" and end["reason"].endswith('Tried to allocate "2 GiB" \\ more (exit code 1)')
    report = json.loads((out / "report.json").read_text())
    assert [(arm["name"], arm["runs"], len(arm["failures"])) for arm in report["arms"]] == [
        ("1f1b", 2, 0), ("breadth-first", 2, 2), ("interleaved-grouped", 2, 0),
    ]  # fmt: skip
    assert "0 of 2: out of memory" in done.stdout
    assert (out / "report.html").exists() and (out / "report.md").exists()


CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if cluster(path).gpus]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
CHUNKED = [word for word in ARMS if SCHEDULES[word].chunks]


@pytest.fixture
def dry_run(monkeypatch, tmp_path, capsys):
    """Return a function: configuration, ranks, more flags -> the command of each arm, without the names of its run."""
    for name in ("DATA_PATH", "VOCAB_FILE", "MERGE_FILE", "TOKENIZER_MODEL"):
        monkeypatch.setenv(name, "data")
    monkeypatch.delenv(CONNECTIONS, raising=False)

    def commands(path, ranks, *flags):
        words = ["ab", "--dry-run", "--launcher", "local", "--output-path", str(tmp_path), "--config", str(path)]
        words += ["--gpus-per-node", str(ranks), "--rounds", "1", "--arms", " ".join(CHUNKED), *flags]
        assert main(words) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "torch.distributed.run" in line]
        return {
            arm: [word.replace(str(tmp_path / f"{arm}.1"), "RUN").replace(f"ARM={arm}", "ARM") for word in line.split()]
            for arm, line in zip(CHUNKED, lines, strict=True)
        }

    return commands


@pytest.mark.parametrize("path", [*CONFIGS, QUICKSTART], ids=lambda path: path.stem)
def test_arms_differ_in_the_schedule_alone(path, dry_run):
    demands = {"--use-distributed-optimizer", "--overlap-param-gather", f"{CONNECTIONS}=1", f"{CONNECTIONS}=32"}
    found = set()
    for arm, words in dry_run(path, cluster(path).gpus or 4).items():
        group = words[words.index(GROUP) + 1] if GROUP in words else "0"
        own = SCHEDULES[arm].flags_for(int(group))
        # The last one: CONFIG has a schedule too.
        begin = max(at for at in range(len(words)) if words[at : at + len(own)] == own)
        rest = words[:begin] + words[begin + len(own) :]
        assert "--no-check-for-nan-in-loss-and-grad" in rest
        if "--use-torch-fsdp2" in own:  # Megatron refuses the first two with it, and one connection
            assert f"{CONNECTIONS}=32" in rest and not demands & {*rest} - {f"{CONNECTIONS}=32"}
        else:
            assert f"{CONNECTIONS}={1 if '--tensor-model-parallel-size' in rest else 32}" in rest
            found.add(tuple(rest))
        sharded = [word for word in rest if word not in demands]
        assert sharded == [word for word in next(iter(found)) if word not in demands]
    assert len(found) == 1


def test_the_group_is_that_of_the_microbatches_of_the_settings(dry_run):
    words = dry_run(QUICKSTART, 4, "--gbs", "12")["interleaved-grouped"]
    assert words[words.index(GROUP) + 1] == "12" and words.count("12") == 2


@pytest.mark.parametrize(
    "environment, extra, connections",
    [
        ({}, "--context-parallel-size 2", "1"),
        ({}, "--tensor-model-parallel-size 2", "1"),
        ({CONNECTIONS: "8"}, "--context-parallel-size 2", "8"),  # Blackwell
    ],
)
def test_the_connections_are_those_that_megatron_demands(environment, extra, connections, dry_run, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for arm, words in dry_run(QUICKSTART, 4, "--extra-args", extra).items():
        wanted = "32" if "sharded" in arm and connections == "1" else connections
        assert [word for word in words if word.startswith(CONNECTIONS)] == [f"{CONNECTIONS}={wanted}"]


def test_1f1b_has_no_chunks_and_the_other_arms_have_the_same(stubs):
    settings = {"ARMS": "1f1b interleaved", "ROUNDS": "1", "VP": "2", "EXTRA_ARGS": "--log-throughput"}
    assert run("ab_local.sh", stubs, **settings).returncode == 0
    (_, _, plain, connections), (_, _, chunks, others) = calls(stubs)
    assert connections == others == "32"  # the ranks have it, beside no other difference of their environment
    flag = "--num-virtual-stages-per-pipeline-rank"
    assert flag not in plain and chunks[chunks.index(flag) + 1] == "2"
    assert "2" not in plain and {"--log-throughput", "--pipeline-schedule", "1f1b"} <= {*plain} & {*chunks}


def test_a_hybrid_model_has_its_own_script_and_its_own_chunks(dry_run, tmp_path, capsys):
    def config(pattern):
        path = tmp_path / "hybrid.yaml"
        path.write_text(QUICKSTART.read_text().replace("--num-layers:", f"--hybrid-layer-pattern: '{pattern}'\n  #"))
        return path

    cut = "*-|*-|*-|*-|*-|*-|*-|*-"
    for words in dry_run(config(cut), 4).values():
        assert "megatron_bfpp.pretrain_hybrid" in words and "--num-virtual-stages-per-pipeline-rank" not in words
        assert words[words.index("--hybrid-layer-pattern") + 1].strip("'") == cut
    for pattern, more, wrong in (
        ("*-" * 8, (), "not with a pattern without |"),
        (cut, ("--vp", "2"), "not with VP=2"),
        (cut, ("--arms", "1f1b"), "1f1b has one chunk per rank"),
    ):
        words = ["ab", "--dry-run", "--launcher", "local", "--output-path", str(tmp_path), "--gpus-per-node", "4"]
        assert main([*words, "--config", str(config(pattern)), *more]) == 2
        assert wrong in capsys.readouterr().err


def test_an_arm_without_chunks_is_compared_and_other_chunks_are_refused(tmp_path):
    chunks, name = "virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"
    runs = [
        make_run(tmp_path, arm, args={chunks: count, name: count, "overlap_p2p_comm": count is not None})
        for arm, count in (("interleaved", 2), ("1f1b", None), ("breadth-first", 4))
    ]
    assert [arm.name for arm in compared(*runs[:2]).arms] == ["interleaved", "1f1b"]
    with pytest.raises(UserError, match=chunks):
        compared(runs[0], runs[2])


def test_flags_and_environment_variables_are_the_same_settings(stubs):
    done = run("ab_local.sh", stubs, "--arms", "interleaved", "--rounds", "1", "--gbs", "16", ROUNDS="5", MBS="2")
    assert done.returncode == 0, done.stderr
    ((_, _, words, _),) = calls(stubs)
    assert words[words.index("--micro-batch-size", words.index("--micro-batch-size") + 1) + 1] == "2"
    assert words[-1 - words[::-1].index("--global-batch-size") + 1] == "16"


def test_full_sharding_leaves_out_the_distributed_optimizer_of_the_configuration(stubs):
    settings = {"VOCAB_FILE": "v", "MERGE_FILE": "m", "NNODES": "64"}
    done = run("ab_throughput.sbatch", stubs, "--dry-run", **settings)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "torch.distributed.run" in line]
    assert len(lines) == 12 and sum("--overlap-param-gather" in line for line in lines) == 9
    sharded = [line for line in lines if "--use-torch-fsdp2" in line]
    assert len(sharded) == 3 and not any("--use-distributed-optimizer" in line for line in sharded)


@pytest.mark.slow
def test_a_second_start_runs_only_what_has_not_finished(stubs):
    settings = {"ARMS": "1f1b breadth-first", "ROUNDS": "1"}
    assert run("ab_local.sh", stubs, FAILS="breadth-first", **settings).returncode == 1
    done = run("ab_local.sh", stubs, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [arm for arm, *_ in calls(stubs)] == ["1f1b", "breadth-first", "breadth-first"]
    assert "1f1b.1 has finished before: skipped" in done.stdout
    kept = stubs.parent / "out" / "unfinished" / "breadth-first-1"
    assert json.loads((kept.parent / "breadth-first.1-1" / "end.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_stopped_script_stops_its_run_and_goes_on_later(stubs):
    settings = {"ARMS": "1f1b breadth-first", "ROUNDS": "1"}
    command = ["bash", str(SCRIPTS / "ab_local.sh")]
    with subprocess.Popen(
        command, env=environment(stubs, HANGS="breadth-first", **settings), stdout=subprocess.DEVNULL
    ) as script:
        for _ in range(600):
            if (stubs / "hanging").exists():
                break
            assert script.poll() is None
            subprocess.run(["sleep", "0.1"], check=True)
        script.terminate()
        assert script.wait(timeout=120) == 143
    assert not (stubs.parent / "out" / "breadth-first.1" / "end.json").exists()
    assert run("ab_local.sh", stubs, **settings).returncode == 0
    assert [arm for arm, *_ in calls(stubs)] == ["1f1b", "breadth-first", "breadth-first"]


@pytest.mark.slow
def test_under_slurm_each_run_is_one_srun_with_a_task_per_node(stubs):
    settings = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "BFPP_PYTHON": sys.executable,  # outside the container
    }
    # SLURM runs a copy.
    spooled = stubs / "slurm_script"
    shutil.copy(SCRIPTS / "ab_throughput.sbatch", spooled)
    config = str(ROOT / "configs" / "quickstart.yaml")
    done = run(
        spooled,
        stubs,
        ARMS="1f1b breadth-first",
        ROUNDS="1",
        GPUS_PER_NODE="2",
        CONFIG=config,
        CONTAINER_IMAGE="image.sqsh",
        **settings,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sruns = [line for line in (stubs / "sruns").read_text().splitlines() if "torch.distributed.run" in line]
    assert len(sruns) == 2
    for line in sruns:
        assert line.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 ") and "--container-image image.sqsh" in line
    for _, _, words, _ in calls(stubs):
        assert words[words.index("--node-rank") + 1] == "0" and words[words.index("--master-addr") + 1] == "node1"
        assert words[words.index("--nnodes") + 1] == "2" and words[words.index("--nproc-per-node") + 1] == "2"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ab_local.sh", "ab_throughput.sbatch", "pretrain_52b.sbatch"])
def test_a_dry_run_prints_the_commands_and_writes_nothing(script, stubs):
    done = run(script, stubs, "--dry-run", VOCAB_FILE="v", MERGE_FILE="m", NNODES="64", PIPELINE_SCHEDULE="1f1b")
    assert done.returncode == 0, done.stderr
    assert "torch.distributed.run" in done.stdout and "--bfpp-run-dir" in done.stdout
    assert not (stubs.parent / "out").exists() and not calls(stubs)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"OUTPUT_PATH": ""}, "OUTPUT_PATH is not set"),
        ({"ARMS": "1f1b gpipe"}, "ARMS: gpipe does not exist"),
        ({"ARMS": "1f1b 1f1b"}, "names 1f1b twice"),
        ({"ROUNDS": "0"}, "ROUNDS=0 must be a whole number"),
        ({"STEPS": "ten"}, "STEPS=ten must be a whole number"),
        ({"GBS": "7", "MBS": "2"}, "GBS=7 is no multiple of MBS 2"),
        ({"GBS": "7"}, "ARMS: interleaved: the last group has 3 microbatches"),
        (
            {"GBS": "2", "ARMS": "breadth-first interleaved-grouped"},
            "ARMS: interleaved-grouped: group is 2; Megatron takes 4 (ranks) to 2 (M)\n  GBS, or --global-batch-",
        ),
        ({"PP": "1"}, "no pipeline ranks"),
        ({"PP": "3", "GPUS_PER_NODE": "4"}, "are no multiple of the 3"),
        ({"PP": "8", "GPUS_PER_NODE": "8"}, "VP is not set"),
        ({"CONFIG": "none.yaml"}, "CONFIG=none.yaml does not exist"),
        ({"MEGATRON_PATH": "/nowhere"}, "has no pretrain_gpt.py"),
    ],
)
def test_bad_settings_end_it_before_anything_runs(settings, words, stubs):
    done = run("ab_local.sh", stubs, **settings)
    assert done.returncode == 2 and words in done.stderr
    assert not calls(stubs)


@pytest.mark.parametrize("script", ["ab_local.sh", "ab_throughput.sbatch", "pretrain_52b.sbatch"])
def test_help_is_the_header_of_the_script(script, stubs):
    done = run(script, stubs, "--help")
    assert (
        done.returncode == 0
        and "--dry-run" in done.stdout
        and "SBATCH" not in done.stdout
        and "set -euo" not in done.stdout
    )


def test_without_an_allocation_the_slurm_script_is_refused(stubs):
    done = run("ab_throughput.sbatch", stubs, VOCAB_FILE="v", MERGE_FILE="m")
    assert done.returncode == 2 and "there is no allocation" in done.stderr


@pytest.mark.parametrize(
    "name", ["quickstart.sh", "slurm_common.sh", "ab_local.sh", "ab_throughput.sbatch", "pretrain_52b.sbatch"]
)
def test_the_scripts_are_sound_bash(name):
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    assert len((SCRIPTS / name).read_text().splitlines()) < 50  # the work is done in Python


@pytest.mark.skipif("not os.environ.get('BFPP_ALL_CASES')", reason="takes 10 s; BFPP_ALL_CASES=1 runs it")
@pytest.mark.parametrize("name", ["ab_local.sh", "ab_throughput.sbatch", "pretrain_52b.sbatch"])
def test_shellcheck_finds_nothing(name):
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    command = [shellcheck, "--external-sources", "--source-path", str(ROOT), str(SCRIPTS / name)]  # and what it sources
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
