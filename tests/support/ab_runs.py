"""Make directories of runs as --bfpp-run-dir leaves them, without a run."""

import json
from pathlib import Path

from megatron_bfpp.compare.numbers import compare
from megatron_bfpp.compare.runs import load

END = {"status": "finished"}
OUT_OF_MEMORY = {"status": "failed", "reason": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"}


def make_run(
    folder: Path, arm: str, round_: int = 1, step_s=0.4, steps=20, args=None, end=END, loss_error=0.0, **header
) -> Path:
    """Make a run of steps of `step_s` seconds, the first 5 ten times that. loss_error: relative, from step 11 on."""
    path = folder / f"{arm}.{round_}"
    path.mkdir(parents=True)
    breadth_first = arm.startswith("breadth-first")
    schedule = "breadth-first" if breadth_first else "1f1b"
    content = {
        "format": "megatron_bfpp run 1", "name": path.name, "arm": arm, "pipeline_schedule": schedule,
        "started": "2026-11-24T10:00:00Z",
        "args": {"pipeline_schedule": schedule, "num_layers": 8, "save": str(path), "use_torch_fsdp2": False,
                 **(args or {})},
        "environment": {"OMP_NUM_THREADS": "1"}, "versions": {"torch": "2.14.1", "transformer-engine": None},
        "commits": {"megatron_bfpp": "abc1234"}, "device": "cpu", "hosts": ["node1"],
        "shape": {"pp": 4, "chunks": 2, "microbatches": 8, "dp": 1, "tp": 1, "cp": 1, "world_size": 4},
        "plan": {"digest": "b542", "bubble_fraction_predicted": 0.158} if breadth_first else None,
        "tokens_per_step": 1600, "flops_per_step": 3.2e12, **header,
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(content))
    with open(path / "steps.jsonl", "w") as file:
        file.writelines(json.dumps(_step(step, step_s, loss_error)) + "\n" for step in range(1, steps + 1))
    if end is not None:
        (path / "end.json").write_text(json.dumps({**end, "ended": "2026-11-24T10:01:00Z", "steps": steps}))
    return path


def _step(step: int, step_s: float, loss_error: float) -> dict:
    loss, norm = 5.0 / step * (1 + loss_error * (step > 10)), 1.0 / step
    traced = {"bubble_fraction_measured": 0.17, "exposed_dp_s": [0.001, 0.002], "exposed_p2p_s": [0.01] * 4}
    return {
        "step": step, "lm loss": loss, "lm loss hex": loss.hex(), "grad norm": norm, "grad norm hex": norm.hex(),
        "step_time_s": None if step == 1 else step_s * (10 if step <= 5 else 1),
        "peak_memory_gib_max_rank": 3 + step / 100, "peak_memory_rank": step % 4, **(traced if step == 10 else {}),
    }  # fmt: skip


def compared(*paths, **options):
    return compare(load([str(path) for path in paths]), **options)


def two_arms(folder, rounds=1, **of_breadth_first):
    paths = [make_run(folder, "1f1b", each, step_s=0.4 + each / 1000) for each in range(1, rounds + 1)]
    return paths + [
        make_run(folder, "breadth-first", each, 0.3 + each / 1000, **of_breadth_first) for each in range(1, rounds + 1)
    ]
