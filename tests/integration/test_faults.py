"""What every rank says and does when one of them fails: the rows of docs/guide/reliability.md."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import fault, happened
from gpt import MODEL, losses, pretrain, train
from jobs import Seen, run_ranks

from megatron_bfpp.console.processes import end_marked, marked

pytestmark = pytest.mark.slow

BREADTH_FIRST = (
    *("--pipeline-schedule", "breadth-first", "--pipeline-model-parallel-size", "4", "--global-batch-size", "8"),
    *("--num-virtual-stages-per-pipeline-rank", "2", "--train-iters", "4"),
)
TIMEOUT_S = 30  # the machine may be busy
SHARED_MEMORY = Path("/dev/shm")


def unused(names: set[str]) -> set[str]:
    """Of files in shared memory, those that no living process has: other jobs of the machine have theirs."""
    used = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used |= set(re.findall(r"/dev/shm/(\S+)", (entry / "maps").read_text()))
            used |= {os.path.basename(os.readlink(link)) for link in (entry / "fd").iterdir()}
    return {name for name in names if name not in used and (SHARED_MEMORY / name).exists()}


class Failed:
    """A job of 4 ranks with a fault on one of them, of which all have ended."""

    def __init__(self, folder: Path, kind: str, at_rank: int, *flags: str, **when: int):
        shared, self.seen, self.folder = set(os.listdir(SHARED_MEMORY)), Seen(), folder
        every = [*MODEL, *BREADTH_FIRST, "--bfpp-timeout-seconds", str(TIMEOUT_S), *flags]
        prepare = fault(kind, at_rank, folder, **when)
        self.codes, self.outputs = run_ranks(
            pretrain, 4, folder, str(folder / "steps.jsonl"), every, prepare, seen=self.seen
        )
        self.others = [rank for rank in range(4) if rank != at_rank]
        assert not self.seen.left, "processes are left behind"
        left, deadline = set(os.listdir(SHARED_MEMORY)) - shared, time.monotonic() + TIMEOUT_S
        while left := unused(left):  # what another job of the machine has just left goes away
            assert time.monotonic() < deadline, f"shared memory is left behind: {left}"
            time.sleep(0.5)

    def messages(self, rank: int) -> list[str]:
        """What the watchdog of a rank said of that rank, without the warnings: one message of two lines."""
        return re.findall(rf"^megatron_bfpp: rank {rank} .*\n  .*$", self.outputs[rank], re.MULTILINE)

    def summary(self, rank: int = 0) -> str:
        """What the first rank collected."""
        found = re.findall(r"^megatron_bfpp: all 4 ranks.*(?:\n  .*)+", self.outputs[rank], re.MULTILINE)
        assert len(found) == 1, self.outputs[rank][-3000:]
        return found[0]

    def check_others(self, within_s: float) -> None:
        """Every other rank ended with one message that names its step and its action."""
        for rank in self.others:
            assert self.codes[rank] == 1, self.outputs[rank][-3000:]
            assert self.seen.ended[rank] - happened(self.folder) < within_s
            assert len(self.messages(rank)) == 1, self.outputs[rank][-3000:]
            assert re.search(
                rf"\(pp_rank {rank}\) on \S+: step 2, in (\d[FB]\d|\d(SEND|RECV)_[FB]\d|the )", self.messages(rank)[0]
            )


@pytest.mark.parametrize("at_rank", [2, 0])
def test_sigkill(tmp_path, at_rank):
    job = Failed(tmp_path, "kill", at_rank)
    assert job.codes[at_rank] == -9
    job.check_others(within_s=TIMEOUT_S)
    summary = job.summary(0 if at_rank else 1)
    assert f"  rank {at_rank} says nothing" in summary
    assert f"pp_rank {at_rank} (rank {at_rank})" in summary  # who waits for it
    assert all(f"  rank {rank} (pp_rank {rank}) on " in summary for rank in job.others)


def test_sigstop(tmp_path):
    # The others wait for the whole time limit of the watchdog.
    job = Failed(tmp_path, "stop", 2, "--bfpp-timeout-seconds", "15")
    assert job.codes[2] is None
    job.check_others(within_s=TIMEOUT_S)
    assert "  rank 2 says nothing" in job.summary()
    assert re.search(r"waiting for 3RECV_F3 from pp_rank 2 \(rank 2\) since \d+\.\d s", job.messages(3)[0])


@pytest.mark.parametrize("kind", ["raise", "raise_in_backward", "raise_in_hook"])
def test_an_error_of_one_rank(tmp_path, kind):
    job = Failed(tmp_path, kind, 2)
    assert job.codes[2] == 1
    job.check_others(within_s=TIMEOUT_S)
    assert "ValueError: the fault of this test" in job.outputs[2] and "Traceback" in job.outputs[2]
    assert re.search(
        r"rank 2 \(pp_rank 2\) on \S+: step 2, in \d[FB]\d .*; raised ValueError: the fault of this test", job.summary()
    )
    # Who only lost its neighbour says so without a traceback of its own.
    assert all("Traceback" not in job.outputs[rank] for rank in job.others)


def test_a_loss_that_is_nan(tmp_path):
    job = Failed(tmp_path, "nan", 3, "--rerun-mode", "disabled", call=1)  # the last stage, which has the loss
    job.check_others(within_s=TIMEOUT_S)
    assert re.search(r"rank 3 \(pp_rank 3\) .*; raised \S*Error: .*NaN", job.summary()), job.summary()


def test_a_loss_that_is_nan_again_when_megatron_repeats_the_step_ends_with_a_checkpoint(tmp_path):
    saving = ("--save", str(tmp_path / "saved"), "--save-interval", "1000")
    job = Failed(tmp_path, "nan", 3, *saving, call=1)
    assert job.codes == [16] * 4, job.outputs[3][-3000:]  # Megatron's code for a restart on other machines
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text().strip() == "1"


def test_a_slow_rank_is_waited_for_and_named_while_it_is(tmp_path):
    usual = losses(4, *BREADTH_FIRST)
    prepare = fault("sleep", 2, tmp_path)
    assert train(tmp_path, 4, *BREADTH_FIRST, "--bfpp-timeout-seconds", "16", prepare=prepare) == usual
    warnings = re.findall(r"megatron_bfpp: WARNING: rank 3 .*", (tmp_path / "rank3.log").read_text())
    assert any("waiting for 3RECV_F3 from pp_rank 2 (rank 2)" in each for each in warnings), warnings


@pytest.mark.parametrize(
    "kind, name, theirs, first",
    [
        ("another_flag", "--global-batch-size", "4", "8"),
        ("another_schedule", "--pipeline-schedule", "1f1b", "breadth-first"),
        ("another_release", "the version of megatron-core", "0.18.9", "0"),
    ],
)
def test_a_rank_started_otherwise_is_refused_by_all_before_a_model_is_built(tmp_path, kind, name, theirs, first):
    job = Failed(tmp_path, kind, 2)
    assert job.codes == [2] * 4, job.outputs[0][-3000:]
    message = job.outputs[0][job.outputs[0].index("megatron_bfpp: error:") :]
    assert re.search(rf"{name} is {theirs} on rank 2 and {first}\S* on rank 0", message), message
    assert len(message.strip().splitlines()) <= 3
    assert not any("building GPT model" in output or "Traceback" in output for output in job.outputs)


def test_a_rank_that_is_refused_alone_says_so(tmp_path):
    codes, outputs = run_ranks(
        pretrain,
        4,
        tmp_path,
        str(tmp_path / "steps.jsonl"),
        [*MODEL, *BREADTH_FIRST],
        fault("a_wrong_flag", 2, tmp_path),
    )
    assert codes[2] == 2
    assert "megatron_bfpp: rank 2 is refused: --breadth-first-backward soon does not exist." in outputs[2]


def test_a_full_disk_while_saving_loses_the_steps_since_the_checkpoint_before(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        saving = ("--save", str(small / "saved"), "--save-interval", "2")
        whole = losses(4, *BREADTH_FIRST)
        job = Failed(tmp_path, "fill_disk", 2, *saving, step=3)
        assert all(job.codes), "the save failed and a rank has gone on"
        assert "No space left" in "".join(job.outputs) or "unexpected pos" in "".join(job.outputs)
        assert (small / "saved" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
        (small / "filler").unlink()
        assert train(tmp_path, 4, *BREADTH_FIRST, "--load", str(small / "saved")) == whole[2:]
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_sigterm_with_megatrons_handler_saves_a_checkpoint_from_which_training_goes_on_exactly(tmp_path):
    whole = losses(4, *BREADTH_FIRST)
    handler = ("--exit-signal-handler", "--save", str(tmp_path / "saved"), "--save-interval", "1000")
    job = Failed(tmp_path, "terminate", 2, *handler)
    assert job.codes == [0] * 4, job.outputs[2][-3000:]
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert train(tmp_path, 4, *BREADTH_FIRST, "--load", str(tmp_path / "saved")) == whole[2:]


def test_a_message_in_the_wrong_place_is_named_by_both_its_ends(tmp_path):
    job = Failed(tmp_path, "send_another", 2, "--bfpp-debug-p2p", call=3)
    job.check_others(within_s=TIMEOUT_S)
    expected = (
        r"pp_rank 3 waits for 2SEND_F2 of \(32, 1, 32\) float32 \(3RECV_F2 here\), "
        r"but pp_rank 2 \(rank 2\) has sent 2SEND_F3 of"
    )
    assert re.search(expected, job.summary()), job.summary()


def test_the_handshake_changes_no_bit(tmp_path):
    usual = losses(4, *BREADTH_FIRST)
    assert train(tmp_path, 4, *BREADTH_FIRST, "--bfpp-debug-p2p") == usual


@contextlib.contextmanager
def torchrun(folder: Path, *flags: str):
    """A job of 2 ranks under torchrun that has done 5 steps, and its log. Afterwards nothing of it may be left."""
    mark, log = f"BFPP_TEST_MARK={folder}", folder / "log"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_bfpp.pretrain_gpt", "--device", "cpu", *MODEL, *BREADTH_FIRST),
        *("--pipeline-model-parallel-size", "2", "--train-iters", "100000", "--save", str(folder / "saved")),
        *("--save-retain-interval", "1000000", *flags),
    ]
    with open(log, "w") as output:
        environment = {**os.environ, "BFPP_TEST_MARK": str(folder)}
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 240
        while not re.search(r"iteration +5/", log.read_text()):
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield job, log
        deadline = time.monotonic() + 60
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not marked(mark), "processes are left behind"
    finally:
        end_marked(mark)
        job.wait()


def test_under_torchrun_a_killed_rank_is_named_before_torchrun_ends_the_others(tmp_path):
    with torchrun(tmp_path, "--save-interval", "2") as (job, log):
        ranks = [pid for pid, each in marked(f"BFPP_TEST_MARK={tmp_path}").items() if "\0RANK=1\0" in each]
        os.kill(min(ranks), signal.SIGKILL)  # the rank itself; what it has started came later
        assert job.wait(timeout=120) != 0
        text = log.read_text()
        said = r"^megatron_bfpp: rank 0 \(pp_rank 0\) on \S+: step \d+.*\n  (it|the job) ends: "
        assert re.search(said, text, re.MULTILINE), text[-3000:]
        assert "  rank 1 says nothing: it is dead, stopped or cut off" in text


def test_a_sigterm_to_torchrun_saves_a_checkpoint_after_others_were_saved(tmp_path):
    with torchrun(tmp_path, "--save-interval", "2", "--exit-signal-handler") as (job, log):
        job.send_signal(signal.SIGTERM)
        job.wait(timeout=120)
        steps = re.findall(r"iteration +(\d+)/", log.read_text())
        assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text().strip() == steps[-1]
        assert "exiting program after receiving SIGTERM" in log.read_text()
