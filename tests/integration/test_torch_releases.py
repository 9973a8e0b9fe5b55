"""The torch of today's containers trains to the same bits: scripts/test.sh --all installs it beside the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = sorted(Path(sys.prefix).glob("beside-torch-*[0-9]"))
# P 2 and P 4 with the bits of 1f1b, ranks that have made different groups before, and recorded steps.
TESTS = (
    "test_equality.py::test_losses_and_gradient_norms_are_bit_identical_to_megatrons_default[2-2-1-1-1-features0]",
    "test_equality.py::test_losses_and_gradient_norms_are_bit_identical_to_megatrons_default[4-2-1-1-2-features7]",
    "test_equality.py::test_split_backwards_keep_the_bits[2-2-1-2-2-features0]",
    "test_groups.py::test_ranks_with_different_groups_before_make_their_channels",
    "test_trace.py::test_every_action_of_the_plan_is_in_the_trace_and_the_losses_have_the_same_bits[2-2]",
)
RUN = """
import sys, pytest, torch
assert torch.__version__.partition("+")[0] == sys.argv[1], torch.__version__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("folder", BESIDE or [None], ids=lambda folder: folder and folder.name)
def test_another_torch_passes_the_tests_that_depend_on_it(folder):
    if folder is None:
        pytest.skip("there is no other torch beside this one: bash scripts/test.sh --all installs one")
    tests = [f"{Path(__file__).parent / name}" for name in TESTS]
    words = [sys.executable, "-c", RUN, folder.name.removeprefix("beside-torch-"), *tests]
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and f"{len(TESTS)} passed" in done.stdout, (done.stdout + done.stderr)[-4000:]
