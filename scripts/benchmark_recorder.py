"""What the recorder costs a rank: python scripts/benchmark_recorder.py [--chunk-ms 20] [--repeat 10]

A rank runs its plan with the executor; a forward takes --chunk-ms (it spins on the process's own clock, so that other
work of the machine does not count) and a backward twice that. Messages arrive at once. "off" is a step that is not
traced; it runs twice, to show the noise. "on" notes every action and a wait per message. Prints process time per
forward or backward, medians over the steps. On a GPU a note takes two CUDA events instead of two readings of the clock.
"""

import argparse
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from megatron_bfpp.runtime.clocks import HostClock
from megatron_bfpp.runtime.data_parallel import DataParallel
from megatron_bfpp.runtime.executor import Executor
from megatron_bfpp.schedule import Action, Op, PipelineShape, breadth_first, lower
from megatron_bfpp.timeline.recorder import Recorder

RANK = 1


class Spinning:
    """The compute of a chunk, in the process's own time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def forward(self, chunk: int, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        _spin(self.seconds)
        return torch.ones(1)

    def backward(self, received: Any, output: torch.Tensor, grad: Any) -> torch.Tensor:
        _spin(2 * self.seconds)
        return output

    def release(self, output: torch.Tensor) -> None:
        """Nothing is sent."""


class Arrived:
    """Messages that need not be waited for, around which the recorder notes a wait as around others."""

    def __init__(self, waiting: Any):
        self.waiting = waiting
        self.tensor = torch.ones(1)

    def post_receive(self, action: Action) -> None:
        """It is there."""

    def receive(self, action: Action) -> torch.Tensor:
        with self._wait(action):
            return self.tensor

    def send(self, action: Action, tensor: torch.Tensor, release: Any = None) -> None:
        with self._wait(action):  # the wait for its end, which comes two actions later
            pass

    def before_compute(self) -> None:
        """Nothing is under way."""

    def finish_send(self, action: Action) -> None:
        """It is over."""

    def assert_finished(self) -> None:
        """Nothing is left."""

    def _wait(self, action: Action) -> AbstractContextManager[object]:
        return nullcontext() if self.waiting is None else self.waiting(action)


def _spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk-ms", type=float, default=20.0, help="a forward of one chunk; default 20")
    parser.add_argument("--repeat", type=int, default=10, help="steps per arm; default 10")
    args = parser.parse_args()
    shape = PipelineShape(4, 2, 4)
    plan = lower(breadth_first(shape), shape)[RANK]
    times: dict[str, list[float]] = {"off": [], "off again": [], "on": []}
    for _ in range(args.repeat):
        for arm, measured in times.items():
            measured.append(_step(shape, plan, args.chunk_ms / 1000, arm == "on"))
    computes = sum(action.op in (Op.F, Op.B) for action in plan)
    medians = {arm: statistics.median(each) * 1e6 / computes for arm, each in times.items()}
    print(f"PP 4 x 2 chunks, 4 micro-batches, forward {args.chunk_ms:g} ms; {args.repeat} steps per arm, in turn")
    for arm, microseconds in medians.items():
        added = microseconds - medians["off"]
        share = added / (10 * args.chunk_ms)
        print(f"{arm:<10}{microseconds:>12.1f} us per chunk{added:>+10.1f} us, {share:+.3f}% of a forward")
    return 0


def _step(shape: PipelineShape, plan: list[Action], seconds: float, is_on: bool) -> float:
    recorder = Recorder(HostClock()) if is_on else None
    gates = DataParallel(None, None, None, [torch.nn.Identity()] * shape.num_chunks)
    messages: Any = Arrived(recorder.waiting if recorder else None)
    executor = Executor(shape, Spinning(seconds), messages, gates, span=recorder.span if recorder else None)
    started = time.process_time()
    with gates:
        executor.run(plan)
    return time.process_time() - started


if __name__ == "__main__":
    sys.exit(main())
