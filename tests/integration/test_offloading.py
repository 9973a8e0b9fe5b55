"""Fine-grained activation offloading under breadth-first: the gradients of a run without it, and as many bytes moved as
under Megatron's default schedule.

The real manager of Megatron and real GPT chunks. On a CPU it moves from memory to memory: what it asks of Transformer
Engine is one flag, and its test for CUDA tensors is answered with yes.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chunks import MICRO_BATCH, SEQUENCE, assert_same, schedules, start, step
from jobs import run_job
from one_rank import next_token

pytestmark = pytest.mark.slow

VOCABULARY, HIDDEN, CHUNKS, STEPS = 64, 16, 2, 3
# Megatron keeps the last groups that the next backward needs at once, and with one layer per chunk, which is all of
# them, takes that for the end of the chunk: its own default schedule fails then ("Chunk mismatch").
LAYERS_PER_CHUNK = 2
MODULES = ["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"]


def gpt_chunks(**config: Any) -> list[Any]:
    """This rank's chunks of a small GPT."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    size, rank = dist.get_world_size(), dist.get_rank()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    made = TransformerConfig(
        num_layers=size * CHUNKS * LAYERS_PER_CHUNK, hidden_size=HIDDEN, num_attention_heads=2,
        pipeline_model_parallel_size=size,
        virtual_pipeline_model_parallel_size=CHUNKS, pipeline_dtype=torch.float32, overlap_p2p_comm=True,
        batch_p2p_comm=False, deallocate_pipeline_outputs=True, attention_dropout=0.0, hidden_dropout=0.0, **config,
    )  # fmt: skip
    model = [
        GPTModel(
            made, get_gpt_layer_local_spec(), VOCABULARY, SEQUENCE, pre_process=chunk * size + rank == 0,
            post_process=chunk * size + rank == size * CHUNKS - 1, position_embedding_type="rope", vp_stage=chunk,
        )
        for chunk in range(CHUNKS)
    ]  # fmt: skip
    for chunk in model:
        chunk.seen = []
    return model


def _offload(microbatches: int) -> None:
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

    start(CHUNKS)
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(VOCABULARY, (MICRO_BATCH, SEQUENCE + 1), generator=generator) for _ in range(microbatches)]
    plain = step(schedules()[0], gpt_chunks(), tokens, forward_step_func=next_token)

    handler, moved = offload.ChunkOffloadHandler, [0]
    transformer_engine.cpu_offload = SimpleNamespace(CPUOffloadEnabled=False)
    handler._can_manage_tensor_for_offload = staticmethod(lambda tensor: not isinstance(tensor, torch.nn.Parameter))
    original = handler.offload

    def counted(self, tensor, *args, **kwargs):
        moved[0] += tensor.numel() * tensor.element_size()
        return original(self, tensor, *args, **kwargs)

    handler.offload = counted
    fields = {"fine_grained_activation_offloading": True, "offload_modules": MODULES, "min_offloaded_tensor_size": 1}
    bytes_of_steps = []
    for schedule in schedules():
        offload.PipelineOffloadManager.reset_instance()
        model, history = gpt_chunks(**fields), []
        for _ in range(STEPS):  # the manager learns the order in the first, and follows it from then on
            moved[0] = 0
            assert_same(plain, step(schedule, model, tokens, forward_step_func=next_token))
            history.append(moved[0])
        bytes_of_steps.append(history)
    print(f"bytes moved: {bytes_of_steps}", flush=True)
    assert bytes_of_steps[0] == bytes_of_steps[1] and all(bytes_of_steps[0])
    assert bytes_of_steps[0][1] < bytes_of_steps[0][0], "the manager has not learned the order"


def test_offloading_changes_no_bit_and_moves_the_bytes_it_moves_under_the_default_schedule(tmp_path):
    run_job(_offload, 2, tmp_path, 4)
