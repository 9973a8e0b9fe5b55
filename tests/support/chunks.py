"""Run the schedule by itself: small model chunks on gloo ranks, one step under Megatron's default and one under ours.

No GPT and no Megatron-LM trainer: a chunk is a plain torch module with what the schedules ask of one (set_input_tensor,
vp_stage, config). A `Run` holds what a test can see of a step. Call from a function that jobs.run_job starts in every
rank; all ranks form one pipeline:

    def job():
        start(num_chunks=2)
        default, ours = both(chunks(2, hidden_size=8), microbatches=4)
        assert_same(default, ours)

Each step starts from the same parameters, without gradients, and reads the same micro-batches. `both` calls the
function that Megatron's chooser returns: ours, and Megatron's original under it (`__wrapped__`); further arguments
go to either. Pieces can be replaced: `chunks(..., kind=...)` takes another module, `forward_step` another forward step
function, and the transport is torch.distributed's isend and irecv, whatever they are at the time of the call.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

SEQUENCE, MICRO_BATCH = 6, 2


@dataclass
class Run:
    """What one step of one rank did."""

    reported: list[Any]  # what the schedule returned: the loss function's reports, on the last rank
    gradients: list[torch.Tensor]  # of every parameter of the rank, chunk by chunk
    seen: list[tuple[Any, ...]] = field(default_factory=list)  # what the chunks and callbacks recorded, in order


class Chunk(torch.nn.Module):
    """x -> x + tanh(x w), on [sequence, micro-batch, hidden]. The first stage's x is the micro-batch's."""

    def __init__(self, config: Any, stage: int, vp_stage: int):
        super().__init__()
        from megatron.core.enums import ModelType

        self.config, self.stage, self.vp_stage = config, stage, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.weight = torch.nn.Parameter(
            torch.randn(config.hidden_size, config.hidden_size, generator=torch.Generator().manual_seed(stage))
        )
        self.seen: list[
            tuple[Any, ...]
        ] = []  # what a test wants to know of; `chunks` gives the chunks of a rank one list
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        self.received = tensors[0]

    def set_is_first_microbatch(self) -> None:
        self.seen.append(("first micro-batch", self.vp_stage))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        x = given if self.received is None else self.received
        return x + torch.tanh(x @ self.weight)


def start(num_chunks: int) -> None:
    """Megatron's process groups over all ranks as one pipeline, on the CPU, with the plugin on."""
    import megatron_bfpp

    megatron_bfpp.enable("breadth-first", device="cpu")
    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=dist.get_world_size(), virtual_pipeline_model_parallel_size=num_chunks
    )


def chunks(
    num_chunks: int,
    kind: Callable[..., Chunk] = Chunk,
    hidden_size: int = 8,
    pp: tuple[int, int] | None = None,
    **config: Any,
) -> list[Chunk]:
    """This rank's chunks, under one TransformerConfig with the fields `config`.

    pp: pp_rank and pipeline ranks; all ranks are one pipeline without it.
    """
    from megatron.core.transformer import TransformerConfig

    rank, size = pp or (dist.get_rank(), dist.get_world_size())
    made = TransformerConfig(
        **{
            "num_layers": size * num_chunks,
            "hidden_size": hidden_size,
            "num_attention_heads": 1,
            "pipeline_model_parallel_size": size,
            "virtual_pipeline_model_parallel_size": num_chunks,
            "pipeline_dtype": torch.float32,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
            "deallocate_pipeline_outputs": True,
            **config,
        }
    )
    model = [kind(made, chunk * size + rank, chunk) for chunk in range(num_chunks)]
    for chunk in model:
        chunk.seen = model[0].seen
    return model


def batch(microbatches: int, hidden_size: int = 8, lengths: list[int] | None = None) -> list[torch.Tensor]:
    """The same micro-batches on every rank, [sequence, micro-batch, hidden]. lengths: of their sequences."""
    generator = torch.Generator().manual_seed(1)
    lengths = lengths or [SEQUENCE] * microbatches
    return [torch.randn(length, MICRO_BATCH, hidden_size, generator=generator) for length in lengths]


def forward_step(data: Iterator[torch.Tensor], chunk: Chunk) -> tuple[torch.Tensor, Callable[..., Any]]:
    """The loss of a micro-batch is the mean square of the last output."""
    given = next(data)
    return chunk(given), partial(mean_square, chunk)


def mean_square(chunk: Chunk, output: torch.Tensor, non_loss_data: bool = False) -> Any:
    if non_loss_data:
        return {"output": output.detach().clone()}
    loss = output.square().mean()
    return loss, {"loss": loss.detach().clone()}


def schedules() -> tuple[Callable[..., list[Any]], Callable[..., list[Any]]]:
    """Megatron's interleaved schedule and ours."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    ours = get_forward_backward_func(pp_size=2, vp_size=2)
    return ours.__wrapped__, ours


def step(schedule: Callable[..., list[Any]], model: list[Chunk], data: list[torch.Tensor], **call: Any) -> Run:
    """One step of `schedule`; the model keeps no gradient of it."""
    seen = model[0].seen
    seen.clear()
    reported = schedule(
        **{
            "forward_step_func": forward_step,
            "data_iterator": [iter(data) for _ in model],
            "model": model,
            "num_microbatches": len(data),
            "seq_length": SEQUENCE,
            "micro_batch_size": MICRO_BATCH,
            "forward_only": False,
            **call,
        }
    )
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return Run(copy.deepcopy(reported), gradients, list(seen))


def both(model: list[Chunk], data: list[torch.Tensor] | int, **call: Any) -> tuple[Run, Run]:
    """The same step under Megatron's default and under breadth-first. data: the micro-batches, or how many."""
    data = batch(data, model[0].config.hidden_size) if isinstance(data, int) else data
    default, ours = (step(schedule, model, data, **call) for schedule in schedules())
    return default, ours


def assert_same(default: Run, ours: Run, training: bool = True) -> None:
    """Reports and gradients are equal, bit for bit, and there are some."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    assert bool(default.reported) == is_last, "the last rank and no other reports"
    assert len(default.reported) == len(ours.reported)
    for theirs, mine in zip(default.reported, ours.reported, strict=True):
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[name], mine[name]) for name in theirs), (theirs, mine)
    assert bool(default.gradients) == training and len(default.gradients) == len(ours.gradients)
    assert all(gradient.abs().sum() > 0 for gradient in default.gradients)
    assert all(map(torch.equal, default.gradients, ours.gradients)), "gradients differ"
