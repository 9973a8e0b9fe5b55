"""A GPT's checkpoint goes on as a hybrid model under breadth-first, as Megatron's own guide says: translated at load.

MEGATRON_LM=PATH of a Megatron-LM checkout of main adds its unmodified scripts, on its own Megatron.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpt import MODEL, train

pytestmark = pytest.mark.slow

CHECKOUT = os.environ.get("MEGATRON_LM", "")
ROOT = Path(__file__).parents[2]
# Saved after step 2 of 4, in the one format of a distributed optimizer's state that Megatron translates.
FLAGS = (
    *("--position-embedding-type", "rope", "--pipeline-model-parallel-size", "2", "--global-batch-size", "4"),
    *("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable", "--train-iters", "4"),
)
SAVING = ("--save-interval", "2")
GPT = ("--num-layers", "4", "--num-virtual-stages-per-pipeline-rank", "2")
HYBRID = ("--hybrid-layer-pattern", "*-|*-|*-|*-")
BREADTH_FIRST = ("--pipeline-schedule", "breadth-first")
RESUMING = ("--ckpt-step", "2")

needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="MEGATRON_LM names no Megatron-LM checkout")


def in_checkout(folder: Path, script: str, *flags: str) -> list[dict]:
    """Train with a script of the checkout, unmodified, or with one of our modules; return as gpt.train does."""
    folder.mkdir(exist_ok=True)
    log = folder / "steps.jsonl"
    log.unlink(missing_ok=True)
    entry = ["megatron_bfpp.run", "--device", "cpu", f"{CHECKOUT}/{script}"] if script.endswith(".py") else [script]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *entry]
    run(folder, [*command, *MODEL, *FLAGS, *flags], BFPP_STEP_LOG=str(log))
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in step.items() if name.endswith(" hex")} for step in steps]


def run(folder: Path, command: list[str], **environment: str) -> None:
    environment = {**os.environ, **environment, "PYTHONPATH": f"{CHECKOUT}:{ROOT}"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.core.dist_checkpointing.gpt_checkpoint_interop") is None,
    reason="Megatron translates a GPT's checkpoint from 0.19 on",
)
def test_a_gpts_checkpoint_translated_at_load_goes_on_bit_for_bit(tmp_path):
    saved = str(tmp_path / "gpt")
    steps = train(tmp_path, 2, *FLAGS, *GPT, *SAVING, "--save", saved)
    assert len({step["lm loss hex"] for step in steps}) == 4, "the losses do not move: nothing is compared"
    assert train(tmp_path, 2, *FLAGS, *HYBRID, *BREADTH_FIRST, "--load", saved, *RESUMING) == steps[2:]


@pytest.fixture(scope="module")
def gpt_of_checkout(tmp_path_factory):
    """Return the steps of a GPT that the checkout's script trains under Megatron's default, and its checkpoint."""
    folder = tmp_path_factory.mktemp("gpt")
    return in_checkout(folder, "pretrain_gpt.py", *GPT, *SAVING, "--save", str(folder / "saved")), folder / "saved"


@needs_checkout
def test_the_unmodified_hybrid_script_has_the_bits_of_the_default_and_so_has_ours(tmp_path):
    default = in_checkout(tmp_path, "pretrain_hybrid.py", *HYBRID)
    assert len({step["lm loss hex"] for step in default}) == 4
    assert in_checkout(tmp_path, "pretrain_hybrid.py", *HYBRID, *BREADTH_FIRST) == default
    assert in_checkout(tmp_path, "megatron_bfpp.pretrain_hybrid", *HYBRID, *BREADTH_FIRST) == default


@needs_checkout
def test_the_checkouts_scripts_go_on_from_a_gpts_checkpoint(tmp_path, gpt_of_checkout):
    steps, saved = gpt_of_checkout
    assert (
        in_checkout(tmp_path, "pretrain_hybrid.py", *HYBRID, *BREADTH_FIRST, "--load", str(saved), *RESUMING)
        == steps[2:]
    )
