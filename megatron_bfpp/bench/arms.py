"""The arms of `bfpp bench`: every schedule of the table, on the same emulated stages and network. Runs in each rank."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import TransformerConfig
from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)

from ..integration.flags.settings import Settings
from ..integration.seams import changed
from ..integration.step import forward_backward, weight_gradients
from ..runtime.weight_gradients import OwedGradients
from ..schedule import Action, Schedule
from . import data_parallel
from .emulate.collectives import Collectives
from .emulate.network import Network
from .emulate.stages import HIDDEN, EmulatedChunk
from .torch_stage import EmulatedStage, ReplicatedStage

Step = Callable[[], None]


class Arms:
    """The arms of a case on this rank, whose process groups exist. steps: per arm, a function that runs one step."""

    def __init__(self, network: Network):
        self.network, self.shape = network, network.case.shape
        is_replicated = network.case.replicas > 1
        self.collectives = Collectives(network, parallel_state.get_data_parallel_group()) if is_replicated else None
        self.plans: dict[str, Schedule] = {}  # of torch's arms, once they are made
        self._chunks = self._model(self._new_chunks())
        ours = Settings("breadth-first", hop=network.case.hop)
        late, megatron = replace(ours, backward="late"), replace(ours, engine="megatron")
        deferred = replace(ours, weight_gradients="deferred", weight_lag=network.case.weight_lag)
        interleaved = schedules.forward_backward_pipelining_with_interleaving
        interleaved = getattr(interleaved, "__wrapped__", interleaved)
        self.steps: dict[str, Step] = {
            "1f1b": self._not_interleaved(),
            "interleaved": lambda: self._grouped(interleaved, self.shape.pp_size),
            "interleaved-grouped": lambda: self._grouped(interleaved, self.shape.num_microbatches),
            "breadth-first": lambda: self._run(forward_backward.run, ours),
            "breadth-first-late": lambda: self._run(forward_backward.run, late),
            "breadth-first-megatron": lambda: self._run(forward_backward.run_megatron, megatron, interleaved),
            "breadth-first-sharded": self._sharded(ours),
            "breadth-first-deferred": lambda: self._deferred(deferred),
            "torch-interleaved": self._torch("torch-interleaved", ScheduleInterleaved1F1B),
            "torch-looped-bfs": self._torch("torch-looped-bfs", ScheduleLoopedBFS),
            "torch-zero-bubble": self._torch("torch-zero-bubble", ScheduleInterleavedZeroBubble),
        }

    def _config(self, has_chunks: bool) -> Any:
        """Make the config that Megatron's command line makes, with warm-up's and cool-down's messages overlapped."""
        size = self.shape.pp_size
        return TransformerConfig(
            num_layers=self.shape.num_stages, hidden_size=HIDDEN, num_attention_heads=1,
            pipeline_model_parallel_size=size,
            virtual_pipeline_model_parallel_size=self.shape.num_chunks if has_chunks else None,
            pipeline_dtype=torch.float64, deallocate_pipeline_outputs=True,
            overlap_p2p_comm=has_chunks, batch_p2p_comm=not has_chunks, overlap_p2p_comm_warmup_flush=has_chunks,
        )  # fmt: skip

    def _new_chunks(self) -> list[EmulatedChunk]:
        return [EmulatedChunk(self._config(True), chunk, self.network) for chunk in range(self.shape.num_chunks)]

    def _model(self, chunks: list[Any]) -> list[Any]:
        """Wrap the chunks, and fill in their config, as Megatron's training loop does."""
        if self.collectives is None:
            return chunks
        model = [
            data_parallel.under_ddp(chunk, self.collectives, in_buckets=not index) for index, chunk in enumerate(chunks)
        ]
        for ddp in model:
            config, has_chunks = ddp.config, len(model) > 1 or ddp.module.vp_stage is not None
            functions = {
                "no_sync_func": [each.no_sync for each in model],
                "grad_sync_func": [each.start_grad_sync for each in model],
                "param_sync_func": [each.start_param_sync for each in model] if has_chunks else None,
            }
            for name, function in functions.items():
                setattr(config, name, function if has_chunks or function is None else function[0])
            config.finalize_model_grads_func = data_parallel.finish
        return model

    def _run(self, schedule: Callable[..., Any], *first: Any, model: Any = None) -> None:
        model = self._chunks if model is None else model
        if self.collectives is not None:
            data_parallel.begin(model if isinstance(model, list) else [model])
        iterators = [None] * len(model) if isinstance(model, list) else None
        schedule(*first, forward_step_func=_forward_step, data_iterator=iterators, model=model,
                 num_microbatches=self.shape.num_microbatches, seq_length=1, micro_batch_size=1)  # fmt: skip

    def _grouped(self, interleaved: Callable[..., Any], group: int) -> None:
        with changed(self._chunks[0].config, microbatch_group_size_per_vp_stage=group):
            self._run(interleaved)

    def _deferred(self, settings: Settings) -> None:
        @contextmanager
        def to_the_network(model: list[Any], owed: OwedGradients | None) -> Iterator[None]:
            with changed(self.network, owed=owed):
                yield

        # In place of Megatron's linear layers, which the emulated stages do not have.
        with changed(weight_gradients, deferred=to_the_network):
            self._run(forward_backward.run, settings)

    def _not_interleaved(self) -> Step:
        (chunk,) = self._model([EmulatedChunk(self._config(False), None, self.network, repeat=self.shape.num_chunks)])
        return lambda: self._run(schedules.forward_backward_pipelining_without_interleaving, model=chunk)

    def _sharded(self, settings: Settings) -> Step:
        if self.collectives is None:
            return _nothing_to_shard
        model = [data_parallel.under_fsdp(chunk, self.collectives) for chunk in self._new_chunks()]
        for chunk in model:
            chunk.config.finalize_model_grads_func = data_parallel.finish
        collectives = self.collectives

        def step() -> None:
            with data_parallel.emulated_reductions(collectives):
                self._run(forward_backward.run, settings, model=model)

        return step

    def _torch(self, arm: str, kind: Any) -> Step:
        shape, group = self.shape, parallel_state.get_pipeline_model_parallel_group()
        example = torch.ones(1, 1, HIDDEN, dtype=torch.float64)
        stages = [
            self._stage(
                EmulatedChunk(None, chunk, self.network), stage, shape.num_stages, torch.device("cpu"), group=group,
                input_args=example if stage == 0 else example.clone().requires_grad_(),
                output_args=example.clone().requires_grad_(),
            )
            for chunk, stage in enumerate(shape.stages_on(group.rank()))
        ]  # fmt: skip
        schedule = kind(
            stages, shape.num_microbatches, loss_fn=lambda output, target: _loss(output)[0], scale_grads=False
        )
        plan = schedule.pipeline_order_with_comms
        # Without UNSHARD, RESHARD and REDUCE_GRAD, which do nothing for a module that is not sharded.
        self.plans[arm] = [
            [Action.parse(str(each)) for each in plan[rank] if each.microbatch_index is not None]
            for rank in range(shape.pp_size)
        ]  # fmt: skip
        batch = torch.ones(shape.num_microbatches, 1, HIDDEN, dtype=torch.float64)

        def step() -> None:
            given = (batch,) if group.rank() == 0 else ()
            target = {"target": batch} if group.rank() == shape.pp_size - 1 else {}
            schedule.step(*given, **target)

        return step

    def _stage(self, chunk: EmulatedChunk, *args: Any, **kwargs: Any) -> EmulatedStage:
        if self.collectives is None:
            return EmulatedStage(chunk, chunk, *args, **kwargs)
        return ReplicatedStage(chunk, *args, collectives=self.collectives, **kwargs)


def _nothing_to_shard() -> None:
    raise ValueError("full sharding takes data parallelism")


def _forward_step(iterator: Any, chunk: EmulatedChunk) -> tuple[torch.Tensor, Callable[..., Any]]:
    return chunk(), _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return output[..., :-1].sum(), {}
