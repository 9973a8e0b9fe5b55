"""The parts of the watchdog without a job. tests/integration/test_faults.py has the jobs."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")

from megatron_bfpp.integration.reliability import orphans  # noqa: E402
from megatron_bfpp.runtime import headers  # noqa: E402
from megatron_bfpp.runtime.activity import Activity, Status  # noqa: E402
from megatron_bfpp.runtime.testimony import MOST_LINES, summary  # noqa: E402
from megatron_bfpp.schedule import Action, Op, PipelineShape  # noqa: E402


def status(rank: int, **more) -> Status:
    found = {"pp_rank": rank, "host": "a", "step": "step 3", "doing": "1F0", "waiting": None, "peer_pp_rank": None,
             "peer_rank": None, "seconds": 2.0, **more}  # fmt: skip
    return Status(rank, **found)


def test_what_an_activity_says():
    activity = Activity()
    assert activity.status(0, "a").what() == "before the first step" and not activity.is_timed
    activity.begin_step("step 7", PipelineShape(4, 2, 8), [1, 3, 5, 7], 2)
    activity.begin(Action(6, Op.F, 4))
    assert activity.is_timed
    activity.wait(Action(6, Op.RECV_F, 4))
    said = activity.status(5, "a")
    assert str(said).startswith(
        "rank 5 (pp_rank 2) on a: step 7, in 6F4, waiting for 6RECV_F4 from pp_rank 1 (rank 3) since 0.0 s"
    )
    activity.wait(Action(6, Op.SEND_F, 3))
    assert "waiting for 6SEND_F3 for it to be taken by pp_rank 3 (rank 7)" in activity.status(5, "a").what()
    activity.waiting = None
    assert "waiting" not in activity.status(5, "a").what()
    activity.end()
    assert activity.status(5, "a").what() == "step 7" and not activity.is_timed


def test_what_was_begun_is_kept_for_the_report_of_an_error_and_no_longer_timed():
    activity = Activity()
    activity.begin(Action(1, Op.B, 2))
    activity.fail()
    assert not activity.is_timed and activity.status(0, "a").doing == "1B2"


def test_on_a_device_the_first_message_that_has_not_arrived_is_what_it_waits_for():
    class Event:
        def __init__(self, done):
            self.query = lambda: done

    activity = Activity()
    activity.begin_step("step 1", PipelineShape(2, 2, 2), [0, 1], 1)
    activity.begin("the optimizer")
    for microbatch, done in enumerate([True, False, False]):
        activity.launched(Action(1, Op.RECV_F, microbatch), Event(done))
    assert activity.status(1, "a").waiting == "1RECV_F1" and activity.status(1, "a").peer_rank == 0


def test_a_summary_begins_with_the_silent_ranks_and_those_who_wait_for_nobody():
    waiting = {"waiting": "1RECV_F0", "peer_pp_rank": 2, "peer_rank": 2}
    text = summary(
        "rank 1 is late", {0: status(0, **waiting), 2: status(2), 3: status(3, ended="raised E", **waiting)}, 4
    )
    first, *lines = text.splitlines()
    assert "all 4 ranks" in first and first.endswith("rank 1 is late")
    assert [line.split()[1] for line in lines] == ["1", "2", "3", "0"]
    assert "says nothing" in lines[0] and lines[2].endswith("; raised E")


def test_a_summary_of_thousands_is_short_and_counts():
    waiting = {"waiting": "1RECV_F0", "peer_pp_rank": 2, "peer_rank": 7}
    text = summary("why", {rank: status(rank, **waiting) for rank in range(4096)}, 4096)
    assert len(text.splitlines()) == MOST_LINES + 2
    assert f"and {4096 - MOST_LINES} more; waiting for: rank 7 (4096 ranks)" in text
    assert len(summary("why", {}, 4096).splitlines()) == MOST_LINES + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("sizes", [(4, 1, 8), (7,), ()])
def test_a_header_says_who_sent_what(dtype, sizes):
    written = headers.write(Action(5, Op.SEND_B, 3), torch.empty(sizes, dtype=dtype, device="meta"))
    assert written.shape == (headers.SIZE,) and written.device.type == "cpu"
    found = headers.read(written)
    assert found.send == Action(5, Op.SEND_B, 3) and found.sizes == sizes
    assert found.dtype in (dtype, None)


def test_what_is_no_header_is_refused():
    with pytest.raises(ValueError, match="no header"):
        headers.read(torch.full((headers.SIZE,), 1 << 40))


def test_a_manager_ends_with_the_process_that_started_it_even_when_that_is_killed():
    code = (
        "import multiprocessing, os, sys, time\n"
        "from megatron_bfpp.integration.reliability.orphans import managers_end_with_this_process\n"
        "if __name__ == '__main__':\n"
        "    with managers_end_with_this_process():\n"
        "        manager = multiprocessing.get_context('spawn').Manager()\n"
        "    print(manager._process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        helper = int(parent.stdout.readline())
        os.kill(helper, 0)  # it is there
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{helper}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{helper}")


def test_managers_are_started_as_before_afterwards():
    start = multiprocessing.managers.BaseManager.start
    with orphans.managers_end_with_this_process():
        assert multiprocessing.managers.BaseManager.start is not start
    assert multiprocessing.managers.BaseManager.start is start
