"""A pattern that the plugin has cut trains to the bits of Megatron's default schedule with the cut that is printed."""

import os
import re

import pytest
from gpt import losses, train

pytestmark = pytest.mark.slow

FLAGS = (
    *("--position-embedding-type", "rope", "--num-experts", "4", "--moe-router-topk", "2"),
    *("--moe-ffn-hidden-size", "32", "--moe-token-dispatcher-type", "alltoall", "--swiglu", "--disable-bias-linear"),
    *("--mamba-state-dim", "8", "--mamba-head-dim", "8", "--mamba-num-groups", "2"),
)
CASES = [(2, "M-*E-M-*E", 4), (2, "*-*-*-*/*-", 2), (4, "*-*-M*-M*E-*M-", 8)]


@pytest.mark.parametrize("pp, pattern, microbatches", CASES if os.environ.get("BFPP_ALL_CASES") else CASES[:1])
def test_the_cut_that_is_printed_has_the_bits_of_the_default_schedule(tmp_path, pp, pattern, microbatches):
    flags = (*FLAGS, "--pipeline-model-parallel-size", str(pp), "--global-batch-size", str(microbatches))
    ours = train(tmp_path, pp, *flags, "--hybrid-layer-pattern", pattern, "--pipeline-schedule", "breadth-first")
    (cut,) = re.findall(r"set --hybrid-layer-pattern '(\S+)'", (tmp_path / "rank0.log").read_text())
    assert cut.replace("|", "") == pattern and cut.count("|") >= 2 * pp - 1
    assert len({step["lm loss hex"] for step in ours}) == 3, "the losses do not move: nothing is compared"
    assert losses(pp, *flags, "--hybrid-layer-pattern", cut) == ours
