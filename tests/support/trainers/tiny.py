"""What the drivers share: a GPT of eight small layers, packed sequences of many lengths, log-probabilities, a record.

Imports nothing of Megatron at its top: a driver decides when its trainer does.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

LAYERS, HIDDEN, HEADS, VOCABULARY, LONGEST = 8, 16, 2, 64, 64
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Job:
    """One run of a driver. The ranks beyond pp hold replicas."""

    schedule: str  # "1f1b" or "breadth-first"
    folder: Path  # each rank writes its record there
    pp: int = 2
    chunks: int = 2
    rollouts: tuple[tuple[int, ...], ...] = ((4, 2), (6,), (2,))  # numbers of micro-batches of the steps of each
    pause_s: float = 0.0  # between rollouts, as for generation
    flags: tuple[str, ...] = ()  # of a trainer with a command line
    variant: str = ""  # of a driver: see there


@dataclass
class Record:
    """Every number of a run that a trainer would use, with all its bits, in the order in which they came."""

    job: Job
    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        """Add a float, a tensor, or a list of them."""
        values = value if isinstance(value, list | tuple) else [value]
        self.lines.append((name, " ".join(map(_bits, values))))

    def write(self, model: Sequence[torch.nn.Module]) -> None:
        """Add the parameters, and write it all for the test."""
        self.add("parameters", [each for chunk in model for each in chunk.parameters()])
        path = self.job.folder / f"{self.job.schedule}{dist.get_rank()}.json"
        path.write_text(json.dumps(self.lines), encoding="utf-8")


def _bits(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        data = value.detach().float().contiguous().numpy().tobytes()
        return hashlib.sha256(data).hexdigest()[:16]
    return float(value).hex()


def microbatch(*seed: int) -> list[torch.Tensor]:
    """Return one to three sequences of 3 to 13 tokens: the same for the same numbers."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**31)
    lengths = torch.randint(3, 14, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def packed(sequences: list[torch.Tensor], multiple: int = 4) -> tuple[torch.Tensor, Any]:
    """Return tokens [1, all of them, padded] and Megatron's parameters of packed sequences, the padding one more."""
    from megatron.core.packed_seq_params import PackedSeqParams

    tokens = torch.cat(sequences)
    lengths = [len(each) for each in sequences]
    if missing := -len(tokens) % multiple:
        tokens, lengths = F.pad(tokens, (0, missing)), [*lengths, missing]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return tokens[None], PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def log_probabilities(logits: torch.Tensor, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return those of each sequence's tokens but the first, from packed logits [1, tokens, vocabulary]."""
    rows, first = F.log_softmax(logits[0].float(), dim=-1), 0
    found = []
    for sequence in sequences:
        predicted = rows[first : first + len(sequence) - 1]
        found.append(predicted.gather(1, sequence[1:, None])[:, 0])
        first += len(sequence)
    return found


def policy_loss(
    now: list[torch.Tensor], old: list[torch.Tensor], reference: list[torch.Tensor], advantage: float
) -> torch.Tensor:
    """Return the sum over sequences of a clipped surrogate with a penalty for leaving the reference."""
    total = now[0].new_zeros(())
    for mine, before, ref in zip(now, old, reference):
        ratio = (mine - before).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        total = total + (0.1 * (mine - ref).square() - surrogate).mean()
    return total


class PackedAttention(torch.nn.Module):
    """Causal attention within each of the packed sequences, on [tokens, heads, size]; Megatron has it on GPUs only."""

    def __init__(self, config: Any, **_: Any):
        super().__init__()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any = None,
        packed_seq_params: Any = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        ends = packed_seq_params.cu_seqlens_q.tolist()
        parts = []
        for first, last in pairwise(ends):
            rows = (each[first:last].transpose(0, 1) for each in (query, key, value))
            parts.append(F.scaled_dot_product_attention(*rows, is_causal=True).transpose(0, 1))
        return torch.cat(parts)


def layer_spec() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec


def gpt(config: Any, pre_process: bool, post_process: bool, vp_stage: int | None) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config, layer_spec(), VOCABULARY, LONGEST, pre_process=pre_process, post_process=post_process,
        share_embeddings_and_output_weights=False, position_embedding_type="rope", vp_stage=vp_stage,
    )  # fmt: skip


def transformer_config(pp: int, chunks: int, dtype: torch.dtype) -> Any:
    """Return the config as trainers without Megatron's command line make it: sizes of messages come with them."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, attention_dropout=0.0, hidden_dropout=0.0,
        pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=chunks, params_dtype=dtype,
        pipeline_dtype=dtype, bf16=dtype is torch.bfloat16, variable_seq_lengths=True, overlap_p2p_comm=True,
        batch_p2p_comm=False, moe_token_dispatcher_type="alltoall", gradient_accumulation_fusion=False,
    )  # fmt: skip


def chunks_of(config: Any, chunks: int) -> list[torch.nn.Module]:
    """Return this rank's chunks, in the model's precision, without a wrapper of data parallelism."""
    from megatron.core import mpu
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import Float16Module

    model = []
    for stage in range(chunks):
        where = {"ignore_virtual": False, "vp_stage": stage}
        model.append(gpt(config, mpu.is_pipeline_first_stage(**where), mpu.is_pipeline_last_stage(**where), stage))
        model[-1].model_type = ModelType.encoder_or_decoder
    return [Float16Module(config, chunk) for chunk in model] if config.bf16 else model


def wrapped(config: Any, model: list[torch.nn.Module], **options: Any) -> list[Any]:
    """Return the chunks in Megatron's wrappers of data parallelism. options: of their config."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(**options)
    ready = [
        DistributedDataParallel(
            config=config, module=chunk, ddp_config=settings, disable_bucketing=number > 0
        )
        for number, chunk in enumerate(model)
    ]  # fmt: skip
    for chunk in ready:
        chunk.broadcast_params()
    return ready


def optimizer_of(model: list[Any], dtype: torch.dtype, is_distributed: bool) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam", lr=LEARNING_RATE, min_lr=LEARNING_RATE, bf16=dtype is torch.bfloat16, params_dtype=dtype,
        use_distributed_optimizer=is_distributed, clip_grad=1.0, weight_decay=0.01,
    )  # fmt: skip
    return get_megatron_optimizer(config, model)


def save(path: Path, model: list[Any], optimizer: Any = None, **metadata: Any) -> None:
    """Write a checkpoint as trainers do without Megatron's own: model chunks by number, and the optimizer's state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    path.mkdir(exist_ok=True)
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy("torch_dist"), _replicas())
    dist_checkpointing.save(_state(model, optimizer, metadata, False), path, sharded_strategy=strategy)


def load(path: Path, model: list[Any], optimizer: Any = None, **metadata: Any) -> None:
    """Read what `save` has written, with the same metadata."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), _replicas())
    state = dist_checkpointing.load(_state(model, optimizer, metadata, True), path, sharded_strategy=strategy)
    for number, chunk in enumerate(model):
        chunk.load_state_dict(state[f"model{number}"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def _replicas() -> Any:
    from megatron.core import mpu

    return mpu.get_data_parallel_group(with_context_parallel=True)


def _state(model: list[Any], optimizer: Any, metadata: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    chunks = [getattr(chunk, "module", chunk) for chunk in model]  # less the wrapper, of data parallelism or precision
    state: dict[str, Any] = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def rank_and_size() -> tuple[int, int]:
    """Return them from the environment, before the ranks have met."""
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
