"""The patches for forks of Megatron-LM apply and go back, and a patched Megatron has the flag without a launcher."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
MAIN = ROOT / "patches" / "main_d98e8a64.patch"  # of the development after the last release
FILE = "megatron/training/arguments.py"  # all that the patches touch

BREADTH_FIRST = ["--pipeline-schedule", "breadth-first"]
SHAPE = [
    *("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
    *("--global-batch-size", "4"),
]


def installed() -> tuple[Path, Path]:
    """The patch of the installed release, and the folder that holds the package `megatron`."""
    import megatron.core.package_info as info

    patch = [each for each in PATCHES if each.name.startswith(f"core_v{info.MAJOR}.{info.MINOR}.")] or [MAIN]
    assert len(patch) == 1, f"{len(patch)} patches for megatron-core {info.__version__}"
    return patch[0], Path(info.__file__).parents[2]


@pytest.fixture
def tree(tmp_path) -> Path:
    """Copy the installed megatron.training: first on the path, it is the one imported (`megatron` is a namespace)."""
    _, site = installed()
    shutil.copytree(site / "megatron" / "training", tmp_path / "fork" / "megatron" / "training")
    # As a fork is. Elsewhere `git apply` may belong to a repository further up, and then skips the file without a word.
    subprocess.run(["git", "init", "--quiet", tmp_path / "fork"], check=True)
    return tmp_path / "fork"


@pytest.fixture
def fork(tree) -> Path:
    subprocess.run(["git", "apply", installed()[0]], cwd=tree, check=True)
    return tree


def python(fork: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(map(str, (fork, ROOT, os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"} | variables
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=fork, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_each_supported_release_has_one_patch_of_at_most_40_lines():
    from megatron_bfpp.integration.relied_on import FIRST, LAST

    releases = [patch for patch in PATCHES if patch != MAIN]
    assert len(releases) == len(PATCHES) - 1
    minors = [re.fullmatch(r"core_v0\.(\d+)\.\d+\.patch", patch.name)[1] for patch in releases]
    assert minors == [str(minor) for minor in range(FIRST[1], LAST[1] + 1)]
    for patch in PATCHES:
        changed = re.findall(r"^[+-](?!\+\+ |-- ).*$", patch.read_text(), re.MULTILINE)
        assert 0 < len(changed) <= 40, f"{patch.name} changes {len(changed)} lines"


@pytest.mark.parametrize("tool", [["git", "apply"], ["patch", "-p1", "-i"]], ids=["git", "patch"])
def test_the_patch_of_the_installed_release_applies_and_goes_back(tool, tree):
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    patch, site = installed()
    original = (tree / FILE).read_bytes()
    subprocess.run([*tool, patch], cwd=tree, check=True)
    assert (tree / FILE).read_bytes() != original
    subprocess.run([*tool, patch, "-R"], cwd=tree, check=True)
    assert (tree / FILE).read_bytes() == original == (site / FILE).read_bytes()


@pytest.mark.slow
def test_a_patched_megatron_leaves_the_package_alone_until_the_schedule_is_named(fork):
    done = python(
        fork,
        "-c",
        f"""
import sys
from megatron.training import arguments
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
assert arguments.__file__.startswith({str(fork)!r})
original, validate = schedules.forward_backward_pipelining_with_interleaving, arguments.validate_args

def parse(*flags):
    sys.argv = ["pretrain_gpt.py", *flags]
    return arguments.parse_args()

args = parse()
assert args.pipeline_schedule is None and args.breadth_first_backward == "eager"
assert arguments.validate_args is validate and get_forward_backward_func(4, 2) is original
assert "megatron_bfpp.integration.activation" not in sys.modules

args = parse("--pipeline-schedule", "breadth-first", "--breadth-first-group-size", "8")
assert (args.pipeline_schedule, args.breadth_first_group_size) == ("breadth-first", 8)
assert arguments.validate_args is not validate
assert get_forward_backward_func(4, 2).__wrapped__ is original
assert parse("--pipeline-schedule", "1f1b").pipeline_schedule == "1f1b"  # again: the flags are there once

import megatron_bfpp, torch
# As before, though CUDA is imitated now.
assert megatron_bfpp.enable() == ("cuda" if torch.cuda.is_available() else "cpu")
megatron_bfpp.disable()
for name in [name for name in sys.modules if name.startswith("megatron_bfpp")]:
    sys.modules[name] = None  # as if it were not installed
assert parse("--pipeline-schedule", "1f1b").pipeline_schedule == "1f1b"
assert get_forward_backward_func(4, 2) is original
parse("--pipeline-schedule", "breadth-first", "--breadth-first-group-size", "8")
""",
    )
    assert done.returncode == 1, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last == "--pipeline-schedule breadth-first needs the package megatron_bfpp, which is not installed."


@pytest.mark.slow
def test_a_patched_megatron_trains_breadth_first_without_a_launcher_to_the_bits_of_an_unpatched_one(fork, tmp_path):
    from gpt import MODEL, train

    reference = train(tmp_path, 2, *SHAPE)
    script, log = tmp_path / "pretrain.py", tmp_path / "fork.jsonl"
    # pretrain_gpt.main calls Megatron's pretrain() as a script of a fork does; enabling is the launcher's, not its.
    script.write_text(
        f"""
import sys
from megatron.training import arguments
assert arguments.__file__.startswith({str(fork)!r})
from megatron_bfpp import pretrain_gpt
pretrain_gpt.main()
assert "megatron_bfpp.run" not in sys.modules
"""
    )
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(fork, *ranks, str(script), *MODEL, *SHAPE, *BREADTH_FIRST, BFPP_STEP_LOG=str(log))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search("^megatron_bfpp .*: breadth-first, PP 2 x 2 chunks = 4 stages", done.stdout, re.MULTILINE)
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [{name: value for name, value in step.items() if name.endswith(" hex")} for step in steps] == reference
    assert len(reference) == 3 and len({step["lm loss hex"] for step in reference}) == 3
