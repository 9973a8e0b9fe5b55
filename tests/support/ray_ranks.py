"""A trainer whose ranks are actors of Ray: it knows nothing of the plugin. Run as a script; writes what its ranks saw.

python -m megatron_bfpp.run tests/support/ray_ranks.py RANKS PORT FILE

The ranks return what they print, and the driver writes FILE (JSON): Ray prints the lines of its workers from a thread
of the driver, which may break a line of the driver's own in two and loses what comes after its shutdown.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import ray


class Other:
    """A worker that has nothing to do with Megatron, such as one that generates."""

    def imported(self) -> list[str]:
        return [name for name in ("torch", "megatron.core") if name in sys.modules]

    def can_enable(self) -> bool:
        return "megatron_bfpp" in sys.modules


class Rank:
    """A rank of a pipeline. Torch and Megatron come with its first call, as where a module of a trainer is imported."""

    def begin(self, rank: int, ranks: int, port: int) -> None:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0"
        )
        import torch.distributed as dist
        from megatron.core import parallel_state

        dist.init_process_group("gloo")
        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)

    def step(self) -> dict:
        """One training step under the function that Megatron's chooser returns, then one under Megatron's own."""
        import torch
        from chunks import batch, chunks, forward_step, step
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        chosen = get_forward_backward_func()
        order: list[int] = []

        def noting(data, chunk):
            order.append(chunk.vp_stage)
            return forward_step(data, chunk)

        model = chunks(2, pp=(parallel_state.get_pipeline_model_parallel_rank(), 2))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            found = [
                step(schedule, model, batch(4), forward_step_func=noting)
                for schedule in (chosen, getattr(chosen, "__wrapped__", chosen))
            ]
        (first, second), gradients = found, [run.gradients for run in found]
        return {
            "order": order[:8],
            "gradients": len(first.gradients),
            "same": all(map(torch.equal, *gradients)) and str(first.reported) == str(second.reported),
            "reports": len(first.reported),
            "printed": printed.getvalue(),
        }


def main(ranks: int, port: int, path: str) -> None:
    ray.init(num_cpus=ranks + 1, include_dashboard=False, log_to_driver=True)
    # A runtime_env of the actor's own, which Ray merges with that of the job.
    options = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    actors = [ray.remote(Rank).options(**options).remote() for _ in range(ranks)]
    other = ray.remote(Other).remote()
    seen = {"other": [ray.get(other.imported.remote()), ray.get(other.can_enable.remote())]}
    ray.get([actor.begin.remote(rank, ranks, port) for rank, actor in enumerate(actors)])
    seen["ranks"] = ray.get([actor.step.remote() for actor in actors])
    seen["driver"] = [name for name in ("torch", "megatron.core") if name in sys.modules]
    Path(path).write_text(json.dumps(seen), encoding="utf-8")
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
