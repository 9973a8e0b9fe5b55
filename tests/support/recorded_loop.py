"""Record the launches of Megatron's own interleaved loop, and of ours behind Megatron's call, as recorded.py does.

It switches Megatron's CPU mode on for the whole process: call `record_step` from a function that jobs.run_job starts.
"""

from typing import Any

import torch
from chunks import Chunk, batch, chunks, schedules, step
from cuda_rules import Programme
from recorded import Recorder, fake_pipeline

from megatron_bfpp.schedule import PipelineShape
from megatron_bfpp.schedule.costs import UNIT


class Kernels(torch.autograd.Function):
    """Launches one kernel forward and one backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, recorder: Recorder, name: str) -> torch.Tensor:
        ctx.recorder, ctx.name = recorder, name
        recorder.compute(f"the forward of {name}", UNIT.forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.recorder.compute(f"the backward of {ctx.name}", UNIT.backward)
        return grad, None, None, None


class RecordedChunk(Chunk):
    recorder: Recorder

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        x = given if self.received is None else self.received
        return Kernels.apply(x, self.weight, self.recorder, f"stage {self.stage}")


def record_step(shape: PipelineShape, is_ours: bool, **config: Any) -> list[Programme]:
    """Run one step of each rank; return what it launches. config: fields of the TransformerConfig."""
    import megatron_bfpp

    megatron_bfpp.enable("breadth-first", device="cpu")
    from megatron.core import parallel_state

    found = []
    for pp_rank in range(shape.pp_size):
        recorder = Recorder(pp_rank)
        with fake_pipeline(recorder, shape.pp_size):
            parallel_state.initialize_model_parallel(
                pipeline_model_parallel_size=shape.pp_size, virtual_pipeline_model_parallel_size=shape.num_chunks
            )
            model = chunks(shape.num_chunks, RecordedChunk, hidden_size=1, **config)
            for chunk in model:
                chunk.recorder = recorder
            step(schedules()[is_ours], model, batch(shape.num_microbatches, hidden_size=1))
            parallel_state.destroy_model_parallel()
        found.append(recorder.programme)
    return found
