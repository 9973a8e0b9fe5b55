"""What a schedule costs the host, and its recorder: python scripts/benchmark_overhead.py [--pp 4] [--microbatches 16]

Model chunks that do next to nothing, on a process group whose messages are done at once (torch's "fake" backend), so
that only the schedules' own Python is left: Megatron's interleaved 1F1B (its default order, and its order with all
micro-batches in one group) and this plugin's executor, on the same shape, in turn, in one process that poses as each
pipeline rank. Prints microseconds of the host per forward or backward, the first decile, and the ratio to Megatron's
loop at nearly the same order, one group of all micro-batches. The ratios count: the times are this machine's.
"recorded" is breadth-first in a traced step, which notes every action and every wait; on a GPU a note takes two CUDA
events instead of two readings of the clock.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

ARMS = ("interleaved", "interleaved-grouped", "breadth-first", "recorded")  # words of schedule/names.py, and one more


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=4, help="pipeline ranks; default 4")
    parser.add_argument("--chunks", type=int, default=4, help="model chunks per rank; default 4")
    parser.add_argument("--microbatches", type=int, default=16, help="micro-batches; at least --pp, default 16")
    parser.add_argument("--repeat", type=int, default=30, help="steps per schedule; default 30")
    parser.add_argument("--rank", type=int, help="pose as this pipeline rank only; default: each in turn")
    args = parser.parse_args()
    if args.rank is not None:
        _one_rank(args)
        return 0
    print(f"PP {args.pp} x {args.chunks} chunks, {args.microbatches} micro-batches, {args.repeat} steps per schedule")
    print(f"{'pp_rank':<8}" + "".join(f"{arm:>{len(arm) + 3}}" for arm in ARMS) + f"{'ratio to ' + ARMS[1]:>31}")
    for rank in range(args.pp):  # a process each: Megatron's process groups are made once per process
        command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--rank", str(rank)]
        subprocess.run(command, check=True, env={**os.environ, "RANK": str(rank)})
    return 0


class Chunk(torch.nn.Module):
    """One multiplication: the least that has a gradient."""

    def __init__(self, config: Any, vp_stage: int):
        super().__init__()
        self.config, self.vp_stage, self.model_type = config, vp_stage, None
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        self.received = tensors[0]

    def forward(self) -> torch.Tensor:
        return self.weight * (torch.ones(1, 1, 1) if self.received is None else self.received)


def _one_rank(args: argparse.Namespace) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import megatron_bfpp

    megatron_bfpp.enable("breadth-first", device="cpu")
    dist.init_process_group("fake", rank=args.rank, world_size=args.pp, store=FakeStore())
    from megatron.core import ModelParallelConfig, parallel_state

    parallel_state.initialize_model_parallel(1, args.pp, args.chunks)
    config = ModelParallelConfig(
        pipeline_model_parallel_size=args.pp, virtual_pipeline_model_parallel_size=args.chunks,
        pipeline_dtype=torch.float32, overlap_p2p_comm=True, batch_p2p_comm=False, overlap_p2p_comm_warmup_flush=True,
        deallocate_pipeline_outputs=True,
    )  # fmt: skip
    config.hidden_size = 1  # of TransformerConfig; all that the schedules read of it
    model = [Chunk(config, chunk) for chunk in range(args.chunks)]
    arms = {name: _timed(run, model, args) for name, run in _arms(config, args.microbatches).items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.repeat):
        for name, step in arms.items():
            times[name].append(step())
    # The fastest tenth: other processes of the machine only ever add time.
    per_action = {arm: sorted(each)[len(each) // 10] * 1e6 / (2 * args.chunks * args.microbatches)
                  for arm, each in times.items()}  # fmt: skip
    row = "".join(f"{per_action[arm]:>{len(arm) + 3}.1f}" for arm in ARMS)
    print(f"{args.rank:<8}{row}{per_action[ARMS[2]] / per_action[ARMS[1]]:>31.3f}", flush=True)


def _arms(config: Any, microbatches: int) -> dict[str, Callable[..., Any]]:
    from megatron.core.pipeline_parallel import schedules

    from megatron_bfpp.integration import process
    from megatron_bfpp.integration.seams import changed
    from megatron_bfpp.runtime.clocks import HostClock
    from megatron_bfpp.timeline.recorder import Recorder

    ours = schedules.forward_backward_pipelining_with_interleaving
    megatron = ours.__wrapped__

    def grouped(**call: Any) -> Any:
        with changed(config, microbatch_group_size_per_vp_stage=microbatches):
            return megatron(**call)

    def recorded(**call: Any) -> Any:
        recorder = Recorder(HostClock())
        recorder.begin()
        with changed(process.RECORDING, recorder=recorder):
            return ours(**call)

    return dict(zip(ARMS, (megatron, grouped, ours, recorded), strict=True))


def _timed(run: Callable[..., Any], model: list[Chunk], args: argparse.Namespace) -> Callable[[], float]:
    def forward_step(iterator: Iterator[Any], chunk: Chunk) -> tuple[torch.Tensor, Callable[..., Any]]:
        return chunk(), lambda output: (output.sum(), {})

    def step() -> float:
        started = time.process_time()
        run(forward_step_func=forward_step, data_iterator=[None] * len(model), model=model,
            num_microbatches=args.microbatches, seq_length=1, micro_batch_size=1)  # fmt: skip
        return time.process_time() - started

    step()  # imports, groups and plans are made at the first
    return step


if __name__ == "__main__":
    sys.exit(main())
