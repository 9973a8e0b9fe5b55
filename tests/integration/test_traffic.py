"""What a rank sends is counted on its process groups, per step, and told where users look."""

import json
import re
from pathlib import Path

import pytest
from gpt import UNTIED, ZERO_1, flags_of, train
from jobs import run_job

pytestmark = pytest.mark.slow

FLAGS = (*flags_of(2, 2, 1, 2, 4), *ZERO_1, *UNTIED)  # fp32; 4 micro-batches per replica


def communication(folder: Path) -> dict:
    """Of the second step: the first one's parameters are there already."""
    return json.loads((folder / "steps.jsonl").read_text().splitlines()[1])["communication"]


@pytest.mark.parametrize("schedule", ["1f1b", "breadth-first"])
def test_a_step_has_a_reduction_and_a_gather_per_chunk_and_a_message_per_stage_and_microbatch(schedule, tmp_path):
    train(tmp_path, 4, *FLAGS, "--pipeline-schedule", schedule, "--bfpp-log-communication", "--log-interval", "1")
    found = communication(tmp_path)
    reductions, gathers = found["data-parallel reduce-scatter"], found["data-parallel all-gather"]
    assert reductions["calls"] == gathers["calls"] == 2
    assert reductions["bytes"] == gathers["bytes"] > 10_000  # fp32 gradients and fp32 parameters
    # The last rank has stages 1 and 3: outputs of the first, gradients of the inputs of both.
    sent = found["pipeline-parallel send"]
    sizes = {
        name: int(value)
        for name, value in re.findall(
            r"^  (seq_length|hidden_size|micro_batch_size) \.+ (\d+)$", log(tmp_path, 0), re.MULTILINE
        )
    }
    message = sizes["seq_length"] * sizes["hidden_size"] * sizes["micro_batch_size"] * 4
    assert sent == {"calls": 3 * 4, "bytes": 3 * 4 * message}
    line = f"step 2, this rank sent: .*data-parallel reduce-scatter 2 \\({reductions['bytes'] / 2**20:.1f} MiB\\)"
    assert re.search(line, log(tmp_path, 3)) and "this rank sent" not in log(tmp_path, 0)


def log(folder: Path, rank: int) -> str:
    return (folder / f"rank{rank}.log").read_text()


def test_the_bytes_of_a_ring(tmp_path):
    run_job(every_kind, 2, tmp_path)


def every_kind():
    import torch
    import torch.distributed as dist

    from megatron_bfpp.integration.observe.traffic import Traffic

    dist.init_process_group("gloo")
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    methods = {name: getattr(dist.ProcessGroup, name) for name in dir(dist.ProcessGroup)}
    traffic = Traffic(lambda group, kind: "all")
    traffic.install()
    four, eight = torch.ones(4), torch.ones(8)
    dist.all_reduce(eight)
    dist.all_reduce(eight, group=alone)  # to nobody
    dist.all_gather_into_tensor(eight, four)
    dist.all_gather([torch.ones(4), torch.ones(4)], four)
    dist.reduce_scatter_tensor(four, eight)
    dist.all_to_all_single(torch.ones(8), eight)
    dist.broadcast(eight, 0)
    dist.barrier()
    if dist.get_rank() == 0:
        dist.isend(four, 1).wait()
    else:
        dist.irecv(four, 0).wait()
    expected = {
        "all all-gather": {"calls": 2, "bytes": 32},
        "all all-reduce": {"calls": 1, "bytes": 32},
        "all all-to-all": {"calls": 1, "bytes": 16},
        "all broadcast": {"calls": 1, "bytes": 16},
        "all reduce-scatter": {"calls": 1, "bytes": 16},
        "all send": {"calls": 1, "bytes": 16},
    }
    if dist.get_rank() == 1:
        del expected["all send"]
    assert traffic.taken() == expected and traffic.taken() == {}
    traffic.remove()
    assert {name: getattr(dist.ProcessGroup, name) for name in methods} == methods
