"""verl's own engine, where verl is installed: breadth-first gives it the bits of the default schedule.

verl, mbridge, tensordict, transformers, ray, omegaconf, hydra-core, codetiming, torchdata and what they ask for; verl
and mbridge without their dependencies (pip install --no-deps), which ask for a GPU's.
"""

import importlib.util
import json
from dataclasses import replace

import pytest
from jobs import run_job
from trainers import verl_itself
from trainers.tiny import Job

missing = [name for name in ("verl", "mbridge", "tensordict") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")]


@pytest.mark.parametrize("ranks, pp", [(2, 2), (4, 2), (4, 4)])
def test_the_engine_computes_the_same_bits(ranks, pp, tmp_path):
    records = []
    for schedule in ("1f1b", "breadth-first"):
        job = Job(schedule, tmp_path, pp)
        run_job(verl_itself.main, ranks, tmp_path, replace(job))
        records.append([json.loads((tmp_path / f"{schedule}{rank}.json").read_text()) for rank in range(ranks)])
    last = dict(records[0][-1])
    assert {"ref_log_probs", "log_probs", "losses", "grad norm", "parameters"} <= last.keys()
    counts = [bits for name, bits in records[0][-1] if name == "micro-batches"]
    assert len(set(counts)) == len(verl_itself.SAMPLES), "the steps have one number of micro-batches"
    assert records[0] == records[1]


def _routes() -> None:
    """Have verl sort what it recorded in each forward of a rank, as for the replay of routes in mode R2."""
    import torch
    from megatron.core import parallel_state
    from verl.utils.megatron.router_replay_utils import reorder_and_merge_vpp_layers

    import megatron_bfpp

    megatron_bfpp.enable("breadth-first", device="cpu")
    parallel_state.get_pipeline_model_parallel_world_size = lambda: 2
    count, chunks = 6, 2
    forwards = [(microbatch, chunk) for chunk in range(chunks) for microbatch in range(count)]
    recorded = [torch.full((1, 3, 1, 1), 10 * microbatch + chunk) for microbatch, chunk in forwards]
    merged = reorder_and_merge_vpp_layers(recorded, count, chunks, microbatch_group_size_per_vp_stage=2)
    assert merged[:, 0, :, 0].tolist() == [[10 * microbatch, 10 * microbatch + 1] for microbatch in range(count)]


def test_recorded_routes_are_sorted_by_the_order_that_ran(tmp_path):
    run_job(_routes, 1, tmp_path)
