"""bfpp doctor --gpu-trial: the judge of each row, on data made by hand, and the table around them."""

import json
import os
import shlex
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import cuda_rules
import pytest
import recorded

from megatron_bfpp.cli import main
from megatron_bfpp.console.processes import Ranks
from megatron_bfpp.doctor import facts as doctor_facts
from megatron_bfpp.doctor.gpu_trial import command, judges, kernels, overlap
from megatron_bfpp.doctor.gpu_trial.judges import Verdict
from megatron_bfpp.doctor.gpu_trial.kernels import Kernel
from megatron_bfpp.doctor.gpu_trial.place import JobFailed, Place
from megatron_bfpp.doctor.gpu_trial.rows import ROWS, Row, walk_job
from megatron_bfpp.doctor.gpu_trial.shapes import positions_of, turns_of
from megatron_bfpp.schedule import PipelineShape
from megatron_bfpp.schedule.costs import Costs
from megatron_bfpp.schedule.plan import plan_of

MACHINE = {
    "failing": [], "gpus": ["NVIDIA H100"] * 2, "capability": [9, 0], "links": ["NV18"], "connections": None,
    "versions": {"torch": "2.14.1", "NCCL": "2.30.7", "Transformer Engine": None}, "launch_blocking": None,
}  # fmt: skip


def test_row_0_fails_for_what_makes_the_others_meaningless():
    wrong, figures = judges.machine(MACHINE)
    assert not wrong and figures.startswith("2 x NVIDIA H100, joined by NV18; torch 2.14.1, NCCL 2.30.7; CUDA_DEVICE")
    assert judges.machine({**MACHINE, "gpus": []}) == Verdict([], "torch 2.14.1, NCCL 2.30.7; no GPU")
    for change, words in (
        ({"failing": [{"name": "torch", "found": "not installed"}]}, "torch: not installed"),
        ({"launch_blocking": "1"}, "CUDA_LAUNCH_BLOCKING=1: unset it"),
        ({"gpus": ["NVIDIA H100", "NVIDIA A100"]}, "of 2 kinds, NVIDIA A100, NVIDIA H100"),
        ({"capability": [7, 0]}, "compute capability 7.0: bf16 needs 8.0"),
    ):
        (wrong,) = judges.machine({**MACHINE, **change}).wrong
        assert words in wrong


def test_links_are_read_from_the_topology_of_nvidia_smi():
    table = (
        "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tPXB\t0-47\t0\nGPU1\tNV18\t X \tSYS\t0-47\t0\nNIC0\tPXB\tSYS\t X \n\nLegend:\n  X = Self\n"
    )
    assert judges.links_of(table) == ["NV18"] and judges.links_of("") == []


def test_row_1_names_the_shape_whose_bits_differ():
    all_good = {"2x2": "", "3x2": "", "4x2": ""}
    assert judges.equality(all_good) == Verdict([], "2x2, 3x2, 4x2: the same bits")
    figures = "2x2: the same bits; not run: 3x2 (3 GPUs), 4x2 (4 GPUs)"
    assert judges.equality({"2x2": ""}) == Verdict([], figures)
    assert judges.equality({"2x2": "", "3x2": "lm loss differs"}).wrong == ["3x2: lm loss differs"]


def test_row_2_allows_losses_of_bf16_to_round_and_no_more():
    good = {"left_out": "", "interleaved": [5.0, 4.0], "breadth-first": [5.0, 4.0], "fully sharded": [5.0, 4.02]}
    assert judges.features(good) == Verdict([], "breadth-first: the same losses, fully sharded differs by 5.0e-03")
    for losses, words in (
        ([5.0, 4.02], "differ by 5.0e-03 of interleaved's, at most 0.001"),
        ([5.0], "has the losses [5.0]"),
        ([], "has the losses []"),
        ([5.0, float("nan")], "has the losses [5.0, nan]"),
    ):
        (wrong,) = judges.features({**good, "breadth-first": losses}).wrong
        assert words in wrong
    without = {**good, "left_out": "FSDP2 needs 4 GPUs"}
    del without["fully sharded"]
    assert judges.features(without) == Verdict([], "FSDP2 needs 4 GPUs, breadth-first: the same losses")


def test_row_3_takes_an_end_or_a_refusal_of_all_ranks_and_nothing_else():
    good = {"codes": [0, 0], "said": "done", "seconds": 9.0}
    refused = {"codes": [2, 2], "said": "megatron_bfpp: error: --timing-log-level 2 does not work", "seconds": 9.0}
    found = judges.endings({"debug at 1": good, "timers at 1": refused, "timers at 8": refused})
    assert found == Verdict([], "1 of 3 jobs ended well; timers refused: --timing-log-level 2 does not work")
    for bad, words in (
        ({**good, "codes": [0, None]}, "did not end after 9 s"),
        ({**good, "codes": [1, 1]}, "ended with [1, 1]"),
        ({**refused, "codes": [2, None]}, "did not end"),  # one rank knows, the other waits
        ({**refused, "said": "usage: pretrain_gpt"}, "ended with [2, 2]"),  # argparse's, in no sentence of ours
    ):
        (wrong,) = judges.endings({"timers at 1": bad}).wrong
        assert words in wrong


def test_row_4_needs_every_position():
    good = {"positions": 90, "passed": 90, "last": "40 of pp_rank 1", "failure": ""}
    assert judges.walk({"1": good}) == Verdict([], "waits passed: 90 with 1 connection(s)")
    for change in ({"passed": 89}, {"failure": "rank 0 ended with 1"}, {"positions": 0, "passed": 0}):
        (wrong,) = judges.walk({"1": good, "32": {**good, **change}}).wrong
        assert wrong.startswith("connections 32:") and "the last begun before action 40 of pp_rank 1" in wrong


def test_the_walk_stops_at_every_action_of_every_rank(tmp_path):
    plan = plan_of(PipelineShape(2, 2, 4), None, True, False).actions
    positions = positions_of(plan)
    assert len(set(positions)) == len(positions) == sum(map(len, plan))
    words = walk_job(Place(2, False, {}, tmp_path), 1).words
    assert int(words[words.index("--train-iters") + 1]) >= len(positions)


def times(breadth_first: float, arms=("1f1b", "interleaved", "interleaved-grouped", "breadth-first")) -> dict:
    seconds = {"1f1b": 1.2, "interleaved": 1.1, "interleaved-grouped": 1.0, "breadth-first": breadth_first}
    steps = [
        {"connections": connections, "arm": arm, "microbatches": count, "seconds": first or seconds[arm]}
        for connections in (1, 32)
        for first in (9.0, None, None, None, None)  # the first step warms up
        for count in (2, 4, 8)
        for arm in arms
    ]
    return {"pp": 2, "connections": [1, 32], "steps": steps}


def test_row_5_fails_where_breadth_first_is_slower_than_grouped():
    wrong, figures = judges.ratios(times(1.01))
    assert not wrong and "M 8, connections 32: 1f1b 1.200 interleaved 1.100 breadth-first 1.010" in figures
    wrong = judges.ratios(times(1.03)).wrong
    assert len(wrong) == 4 and wrong[0] == "M 4, connections 1: breadth-first takes 1.030 x grouped"  # not M = P
    wrong = judges.ratios(times(1.0, ("1f1b", "interleaved", "breadth-first"))).wrong
    assert len(wrong) == 6 and "only 1f1b, interleaved, breadth-first was measured" in wrong[0]
    unfinished = times(1.0)
    unfinished["steps"] = [step for step in unfinished["steps"] if step["microbatches"] < 8]
    assert judges.ratios(unfinished).wrong[0] == "M 8, connections 1: only nothing was measured"


def test_the_arms_take_turns_at_three_sizes():
    assert turns_of(1, 4) == [("1f1b", 4), ("1f1b", 8), ("1f1b", 16)]
    assert len(turns_of(2, 2)) == 9 and turns_of(2, 2)[:2] == [("interleaved", 2), ("interleaved-grouped", 2)]


def emulated(hop: float, queue=cuda_rules.own) -> list[list[Kernel]]:
    """Return the kernels of each rank's step: the executor's own launches under CUDA's rules; a forward is 100 us."""
    recorders = recorded.record(PLAN, SHAPE, Costs(reduction=0.9))
    found = []
    for recorder, ends in zip(recorders, cuda_rules.run(recorded.programmes(recorders), hop, queue)):
        kernels_of_rank, end_of, started = [], {}, {}  # the last start on each hardware queue
        for command_of_rank, end in zip(recorder.programme, ends):
            stream, hardware = command_of_rank.stream, queue(recorder.pp_rank, command_of_rank.stream)
            before = [end_of[each] for each in (stream, *command_of_rank.after) if each in end_of]
            start = max(0.0, started.get(hardware, 0.0), *before)
            started[hardware] = start
            end_of[stream] = end_of[command_of_rank] = end
            message = command_of_rank.end
            kind = {recorded.COMPUTE: "gemm", recorded.DATA: "collective"}.get(stream)
            kind = kind if message is None else "send" if message.is_send else "receive"
            if end > start and "wait" not in command_of_rank.name:
                kernels_of_rank.append(Kernel(kind, command_of_rank.name, 0.0, 100 * start, 100 * end))
        found.append(sorted(kernels_of_rank, key=lambda kernel: kernel.start))
    return found


SHAPE = PipelineShape(2, 2, 8)
PLAN = plan_of(SHAPE, None, True, False).actions


def row_6(loud: list[list[Kernel]], quiet: list[list[Kernel]] | None = None, dp: int = 2) -> Verdict:
    return judges.kernels({"shape": [2, 2, 8], "dp": dp, "kernels": loud, "quiet": quiet or emulated(0)})


def test_row_6_takes_a_step_in_which_all_runs_beside():
    wrong, figures = row_6(emulated(0.3))
    assert not wrong and "products 1.000 x" in figures and "not judged" not in figures
    assert "reductions not judged: they need 4 GPUs" in row_6(emulated(0.3), dp=1).figures


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda each: None if each.kind == "receive" else each, "0% of its receives run beside"),
        (lambda each: each._replace(start=1e6, end=1e6 + 5) if each.kind == "send" else each, "of its sends run"),
        (lambda each: each._replace(end=5000.0) if each.action == "2RECV_F0" else each, "2RECV_F0 first"),
        (lambda each: each._replace(end=9000.0) if each.action == "1RECV_B0" else each, "1RECV_B0 first"),
        (lambda each: None if each.kind == "collective" else each, "no reduction of a chunk but the first"),
        (lambda each: each._replace(start=8e5, end=9e5) if each.kind == "collective" else each, "beside no backward"),
        (lambda each: each._replace(end=each.end + 8) if each.kind == "gemm" else each, "of those without messages"),
        (lambda each: None if each.action in ("0B7", "1B7") else each, "matrix products, and 32 without"),
        (lambda each: None, "its trace has no kernels"),
    ],
)
def test_row_6_names_what_is_wrong_with_a_step(change, words):
    loud = [[new for each in rank if (new := change(each))] for rank in emulated(0.3)]
    assert any(words in wrong for wrong in row_6(loud).wrong), row_6(loud).wrong


def test_row_6_finds_computation_that_stands_behind_another_actions_receive():
    for hop in (0.1, 1.0):
        assert [list(overlap.blocked(rank)) for rank in emulated(hop)] == [[], []]
    # With one hardware queue a receive that cannot start holds up what was launched behind it.
    held = row_6(emulated(1.0, cuda_rules.one))
    assert any("of its step stood behind pending receives" in wrong for wrong in held.wrong), held
    # The computation after the gap waits for its own receive, or was launched only then: nobody held it up.
    before, receive = Kernel("gemm", "0F0", 0, 0, 100), Kernel("receive", "2RECV_F0", 0, 50, 300)
    for after, expected in (
        (Kernel("gemm", "0F1", 0, 301, 400), [("2RECV_F0", 201)]),
        (Kernel("gemm", "2F0", 0, 301, 400), []),
        (Kernel("gemm", "0F1", 300, 301, 400), []),
        (Kernel("gemm", "0F1", 0, 350, 400), []),  # the gap ends with something else
    ):
        assert list(overlap.blocked([before, receive, after])) == expected


TRACE = [
    {"ph": "X", "cat": "user_annotation", "name": "PP:0F0", "ts": 100, "dur": 50, "pid": 1, "tid": 1},
    {"ph": "X", "cat": "user_annotation", "name": "PP:0SEND_F0", "ts": 160, "dur": 10, "pid": 1, "tid": 1},
    {"ph": "X", "cat": "user_annotation", "name": "PP:0RECV_B0", "ts": 180, "dur": 10, "pid": 1, "tid": 1},
    {"ph": "X", "cat": "user_annotation", "name": "Optimizer.step", "ts": 300, "dur": 10, "pid": 1, "tid": 1},
    *(
        {"ph": "X", "cat": kind, "name": "launch", "ts": ts, "dur": 1, "args": {"correlation": number}}
        for number, (kind, ts) in enumerate(
            [("cuda_runtime", 110), ("cuda_driver", 120), ("cuda_runtime", 165), ("cuda_runtime", 185),
             ("cuda_runtime", 140), ("cuda_runtime", 290)]
        )
    ),
    *(
        {"ph": "X", "cat": "kernel", "name": name, "ts": 1000 + 10 * number, "dur": 5, "args": {"correlation": number}}
        for number, name in enumerate(
            ["nvjet_tst_128x256", "void at::native::vectorized_elementwise_kernel", "ncclDevKernel_SendRecv(args)",
             "ncclDevKernel_SendRecv(args)", "ncclDevKernel_ReduceScatter_Sum_f32", "sm80_xmma_gemm_bf16"]
        )
    ),
    {"ph": "M", "name": "process_name"},
]  # fmt: skip


def test_kernels_are_given_to_the_action_that_launched_them(tmp_path):
    found = kernels.kernels_of(TRACE)
    assert [(each.kind, each.action) for each in found] == [
        ("gemm", "0F0"), ("other", "0F0"), ("send", "0SEND_F0"), ("receive", "0RECV_B0"), ("collective", "0F0"),
        ("gemm", ""),
    ]  # fmt: skip
    assert found[1] == Kernel("other", "0F0", 120, 1010, 1015)


def test_row_7_compares_the_host_with_the_kernels():
    rank = {"host_s": 6e-4, "actions": 6, "kernels": [Kernel("gemm", "0F0", 0, 0, 600), Kernel("other", "", 0, 0, 400)]}
    messages = {**rank, "kernels": [*rank["kernels"], Kernel("receive", "1RECV_F0", 0, 0, 1e6)]}  # no work of the GPU
    wanted = Verdict([], "100 us of the host per action, 0.60 of the GPU's time")
    assert judges.host({"ranks": [rank, messages]}) == wanted
    assert judges.host({"ranks": [rank, {**rank, "host_s": 8e-4}]}).wrong == [
        "rank 1: the host takes 0.80 of the GPU's time, at most 0.7 allowed"
    ]
    assert judges.host({"ranks": [{**rank, "kernels": []}]}).wrong == ["rank 0: its trace has no kernels"]


def test_row_8_compares_peaks_with_the_plan_and_counts_messages():
    rank = {"pp_rank": 0, "peak_bytes": 1.04 * 2**30, "predicted_bytes": 2**30, "alive": 4, "messages": 30, "chunks": 2}
    assert judges.memory({"ranks": [rank]}) == Verdict(
        [], "peaks 1.04 GiB (+4.0%); no message but the last of each chunk outlives the step"
    )
    for change, words in (
        ({"peak_bytes": 1.06 * 2**30}, "1.06 GiB (+6.0%) against 1.00 of the plan"),
        ({"peak_bytes": 0.94 * 2**30}, "0.94 GiB (-6.0%)"),  # a plan that promises too much is wrong, too
        ({"alive": 5}, "5 of 30 messages outlive the step"),
        ({"messages": 0}, "4 of 0 messages"),  # nothing was counted
    ):
        (wrong,) = judges.memory({"ranks": [{**rank, **change}]}).wrong
        assert words in wrong


KILLED = {"codes": [1, -9], "seconds": 12.0, "timeout_s": 10.0, "dumps": 1, "device": "cuda"}


def test_row_9_needs_every_rank_to_end_in_time_and_a_dump_of_nccl():
    good = KILLED
    assert judges.killed(good) == Verdict([], "all had ended after 12.0 s of 25 s; 1 dump(s)")
    on_cpu = judges.killed({**good, "dumps": 0, "device": "cpu"})
    assert not on_cpu.wrong and "dumps need NCCL" in on_cpu.figures
    for change, words in (
        ({"codes": [None, -9]}, "25 s after the kill ranks [0] still run"),
        ({"seconds": 26.0}, "25 s after the kill"),
        ({"codes": [0, -9]}, "a rank whose peer was killed must fail"),
        ({"dumps": 0}, "no rank has left NCCL's flight recorder"),
    ):
        (wrong,) = judges.killed({**good, **change}).wrong
        assert words in wrong


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A trial that fails keeps its folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def fails(place):
    raise JobFailed("rank 1 ended with 1: RuntimeError: no")


@pytest.mark.parametrize(
    "gpus, rows, code, words",
    [
        (2, [("ok", 0), ("ok", 2)], 0, "2 ok"),
        (0, [("ok", 0), ("not run", 2)], 4, "needs 2 GPUs"),
        (0, [("fail", 0), ("not run", 1)], 1, "needs 1 GPU"),
        (1, [("ok", 0), ("not judged", 2)], 4, "one GPU, which two ranks share"),
        (1, [("ok", 0), ("fail", 1)], 1, "RuntimeError: no"),
    ],
)
def test_the_table_and_the_exit_code_tell_what_was_run(gpus, rows, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "ROWS", [
        Row("a row", needs, fails if status == "fail" else lambda place: {"measured": 1},
            lambda data, status=status: Verdict(["too slow"] if status == "not judged" else [], "figures"),
            times=status == "not judged")
        for status, needs in rows
    ])  # fmt: skip
    facts = {"torch": {"devices": [{"name": "H100"}] * gpus}}
    monkeypatch.setattr(doctor_facts, "gather", lambda on_part: facts)
    path = tmp_path / "trial.json"
    assert main(["doctor", "--gpu-trial", "--json", str(path)]) == code
    output = capsys.readouterr().out
    assert words in output
    content = json.loads(path.read_text())
    assert [row["status"] for row in content["rows"]] == [status for status, _ in rows]
    assert [line.split(None, 1)[1].startswith(status) for line, (status, _) in zip(output.splitlines()[1:], rows)] == [
        True, True,
    ]  # fmt: skip
    assert content["facts"] == facts and content["rows"][0]["data"] == (
        None if rows[0][0] == "fail" else {"measured": 1}
    )


def test_the_page_shows_what_a_machine_without_gpus_prints(monkeypatch, capsys):
    data = {0: {**MACHINE, "gpus": []}, 1: {"2x2": ""}, 9: {**KILLED, "device": "cpu"}}
    rows = [replace(row, run=lambda place, number=number: data[number]) for number, row in enumerate(ROWS)]
    monkeypatch.setattr(command, "ROWS", rows)
    monkeypatch.setattr(doctor_facts, "gather", lambda on_part: {})
    assert main(["doctor", "--gpu-trial"]) == 4
    page = (Path(command.__file__).parents[3] / "docs" / "guide" / "gpu_trial.md").read_text(encoding="utf-8")
    table = page.partition("$ bfpp doctor --gpu-trial\n")[2].partition("```")[0]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(table.splitlines()) == len(ROWS) + 2
    for shown, line in zip(table.splitlines(), printed):
        assert line.startswith(shown.partition("...")[0])


@pytest.fixture
def started(monkeypatch):
    """What jobs start: (command, environment) of each rank; none runs, and all end well."""
    found = []
    monkeypatch.setattr(Ranks, "start", lambda self, command, log, environment: found.append((command, environment)))
    monkeypatch.setattr(Ranks, "wait", lambda self, *_: [0, 0])
    return found


def test_jobs_run_side_by_side_on_gpus_of_their_own(started, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    place = Place(4, True, {}, tmp_path)
    ended = place.run([place.job(f"job{number}", 2, ["--words"], 8) for number in range(3)])
    assert len(ended) == 3 and not any(each.failure for each in ended)
    variables = [(each["CUDA_VISIBLE_DEVICES"], each["CUDA_DEVICE_MAX_CONNECTIONS"]) for _, each in started]
    assert variables == [(gpus, "8") for gpus in ("4,5", "4,5", "6,7", "6,7", "4,5", "4,5")]
    assert all("NCCL_MULTI_RANK_GPU_ENABLE" not in each for _, each in started)


def test_two_ranks_share_one_gpu(started, tmp_path):
    place = Place(1, False, {}, tmp_path)
    place.train(place.job("shared", place.ranks, ["--words"], observers="walk"))
    assert [(each["RANK"], each["LOCAL_RANK"], each["LOCAL_WORLD_SIZE"]) for _, each in started] == [
        ("0", "0", "1"), ("1", "0", "1"),
    ]  # fmt: skip
    for command_line, variables in started:
        wanted = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2", "NCCL_NVLS_ENABLE": "0"}
        assert wanted.items() <= variables.items()
        words = ["-m", "megatron_bfpp.run", "--device", "cuda", str(tmp_path / "shared" / "observed.py"), "walk"]
        assert command_line[1:7] == words and "--words" in command_line


def test_an_nccl_of_one_rank_per_gpu_is_no_failure(tmp_path, monkeypatch, capsys):
    def duplicate(place):
        (place.folder / "job.rank0.log").write_text(
            "torch.distributed.DistBackendError\nDuplicate GPU detected : rank 0"
        )
        raise JobFailed("rank 0 ended with 1: torch.distributed.DistBackendError")

    for gpus, code in ((1, 4), (2, 1)):  # with two GPUs it is one
        monkeypatch.setattr(command, "ROWS", [Row("a row", 1, duplicate, judges.walk)])
        monkeypatch.setattr(doctor_facts, "gather", lambda on_part: {"torch": {"devices": [{}] * gpus}})  # noqa: B023
        assert main(["doctor", "--gpu-trial"]) == code
    assert "this NCCL runs one rank per GPU: needs 2 GPUs" in capsys.readouterr().out


def test_a_trial_without_jobs_is_none(capsys):
    assert main(["doctor", "--gpu-trial", "--no-run"]) == 2
    assert "Leave out one of them." in capsys.readouterr().err


def test_the_script_of_slurm_runs_the_trial_in_the_jobs_container(tmp_path):
    root = Path(command.__file__).parents[3]
    settings = {"PATH": os.environ["PATH"], "OUTPUT_PATH": str(tmp_path), "CONTAINER_IMAGE": "torch.sqsh"}
    words = ["bash", str(root / "scripts" / "gpu_trial.sbatch"), "--dry-run"]
    printed = shlex.split(subprocess.run(words, env=settings, capture_output=True, text=True, check=True).stdout)
    assert printed[:5] == ["srun", "--nodes=1", "--ntasks=1", "--container-image", "torch.sqsh"]
    assert printed[-4:] == ["doctor", "--gpu-trial", "--json", f"{tmp_path}/gpu-trial-0.json"]
