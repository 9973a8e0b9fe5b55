"""One rank of a pipeline of GPT chunks, alone in its process: its peers are made up, and their messages are random.

Two runs of the same rank receive the same numbers, so what they compute and send can be compared bit by bit. A received
buffer is NaN until its wait() returns, and a sent tensor is read as late as allowed, when its sender waits.
"""

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from chunks import MICRO_BATCH, SEQUENCE

VOCABULARY, HIDDEN, LAYERS = 64, 16, 2  # LAYERS: of a chunk


class Work:
    """What isend and irecv return."""

    def __init__(self, finish: Any):
        self._finish, self._is_waited_for = finish, False

    def is_completed(self) -> bool:
        return self._is_waited_for

    def wait(self) -> bool:
        if not self._is_waited_for:
            self._finish()
        self._is_waited_for = True
        return True


@dataclass
class Peers:
    """Stands for torch.distributed's isend and irecv."""

    works: list[Work]
    sent: list[torch.Tensor] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)

    def isend(self, tensor: torch.Tensor, dst: int, group: Any) -> Work:
        return self._keep(lambda: self.sent.append(tensor.detach().clone()))

    def irecv(self, buffer: torch.Tensor, src: int, group: Any) -> Work:
        self.counts[group.group_desc] += 1
        seed = zlib.crc32(f"{group.group_desc} {self.counts[group.group_desc]}".encode())
        numbers = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            buffer.fill_(math.nan)

        def arrive() -> None:
            with torch.no_grad():
                buffer.copy_(numbers)

        return self._keep(arrive)

    def _keep(self, finish: Any) -> Work:
        self.works.append(Work(finish))
        return self.works[-1]


def start(pp_size: int, pp_rank: int, num_chunks: int) -> None:
    """Begin anew as this rank, with Megatron's process groups on torch's fake backend."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=pp_rank, world_size=pp_size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=pp_size, virtual_pipeline_model_parallel_size=num_chunks,
        create_gloo_process_groups=False,  # the fake store of torch 2.9 serves none
    )  # fmt: skip


def gpt_chunks(num_chunks: int, positions: str, zero_1: bool = False, layer: Any = None, **config: Any) -> list[Any]:
    """Return this rank's chunks of a small GPT under Megatron's DDP, as its trainer wraps them.

    zero_1: with Megatron's hooks that gather parameters, of one replica. layer: Megatron's spec; None for local ones.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    made = TransformerConfig(
        num_layers=size * num_chunks * LAYERS, hidden_size=HIDDEN, num_attention_heads=2,
        pipeline_model_parallel_size=size, virtual_pipeline_model_parallel_size=num_chunks,
        pipeline_dtype=torch.float32, overlap_p2p_comm=True, batch_p2p_comm=False, deallocate_pipeline_outputs=True,
        attention_dropout=0.0, hidden_dropout=0.0, **config,
    )  # fmt: skip
    wrapping = DistributedDataParallelConfig(
        overlap_grad_reduce=True, bucket_size=1000, use_distributed_optimizer=zero_1, overlap_param_gather=zero_1,
        align_param_gather=zero_1,
    )  # fmt: skip
    model = [
        DistributedDataParallel(
            made, wrapping,
            GPTModel(
                made, layer or get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE, pre_process=chunk * size + rank == 0,
                post_process=chunk * size + rank == size * num_chunks - 1, position_embedding_type=positions,
                vp_stage=chunk,
            ),
        )
        for chunk in range(num_chunks)
    ]  # fmt: skip
    made.no_sync_func = [chunk.no_sync for chunk in model]
    made.param_sync_func = [chunk.start_param_sync for chunk in model] if zero_1 else None
    made.grad_sync_func = [chunk.start_grad_sync for chunk in model]
    made.finalize_model_grads_func = finalize_model_grads
    return model


def next_token(data: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(data)  # [micro-batch, sequence + 1]
    positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
    return chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:]), mean


def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return losses.mean(), {"loss": losses.mean().detach().clone()}


def train(settings: Any, model: list[Any], steps: list[int], works: list[Work]) -> list[list[torch.Tensor]]:
    """Run steps of so many micro-batches, an evaluation where negative.

    Return for each what it reported, what it sent and the gradients. works: takes the handle of every message.
    """
    from megatron_bfpp.integration.step import forward_backward
    from megatron_bfpp.runtime import p2p

    peers = Peers(works)
    p2p.dist = SimpleNamespace(**{**vars(dist), "isend": peers.isend, "irecv": peers.irecv})
    generator, seen = torch.Generator().manual_seed(3), []
    for microbatches in steps:
        evaluation, shape = microbatches < 0, (MICRO_BATCH, SEQUENCE + 1)
        tokens = [torch.randint(VOCABULARY, shape, generator=generator) for _ in range(abs(microbatches))]
        for chunk in model:
            chunk.train(not evaluation)
            chunk.zero_grad_buffer()
        peers.sent.clear()
        with torch.set_grad_enabled(not evaluation):
            reported = forward_backward.run(
                settings, forward_step_func=next_token, data_iterator=[iter(tokens) for _ in model], model=model,
                num_microbatches=abs(microbatches), seq_length=SEQUENCE, micro_batch_size=MICRO_BATCH,
                forward_only=evaluation,
            )  # fmt: skip
        parameters = [] if evaluation else [each for chunk in model for each in chunk.parameters()]
        gradients = [each.main_grad.clone() for each in parameters]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.1 * gradient)
        seen.append([*(report["loss"] for report in reported), *peers.sent, *gradients])
    return seen
