"""verl's own MegatronEngine on CPU ranks: actor and reference, its dynamic batches, its loss, its offloading.

Run with verl 0.9.1 and mbridge 0.15.1. What stands in for a machine with GPUs and weights on a disk: the attention of
packed sequences, layers without Transformer Engine, random weights, and the size of a device's memory. mbridge asks for
a name that Megatron has since dropped.
"""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from .tiny import HEADS, HIDDEN, LAYERS, LEARNING_RATE, LONGEST, VOCABULARY, Job, PackedAttention, Record

SAMPLES = (8, 14, 22)  # of the steps; verl packs them into 4, 8 and 12 micro-batches
MOST_TOKENS = 28  # of a micro-batch


def main(job: Job) -> None:
    """Run the job in this rank."""
    import megatron_bfpp

    megatron_bfpp.enable(job.schedule, device="cpu")
    _stand_in()
    dist.init_process_group("cpu:gloo,cuda:nccl")  # as its workers; the CPU mode starts gloo
    from verl.workers.utils.losses import sft_loss

    path = _hugging_face_model(job)
    actor, reference = engine(job, path, forward_only=False), engine(job, path, forward_only=True)
    record = Record(job)
    for step, count in enumerate(SAMPLES):
        for name, one in (("ref_log_probs", reference), ("log_probs", actor)):
            with one.eval_mode():
                found = one.infer_batch(batch(step, count))
            if found:
                record.add(name, found["model_output"]["log_probs"].values())
        with actor.train_mode():
            found = actor.train_batch(batch(step, count), functools.partial(sft_loss, None))
        if found:
            record.add("micro-batches", len(found["loss"]))
            record.add("losses", found["loss"])
            record.add("grad norm", found["metrics"]["grad_norm"])
    actor.to("cuda")
    record.write(actor.module)


def batch(step: int, count: int) -> Any:
    """Return the samples of this replica, of 9 to 13 tokens, as verl's workers hand them over."""
    from megatron.core import mpu
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(100 * step + mpu.get_data_parallel_rank())
    lengths = torch.randint(9, 14, (count,), generator=generator).tolist()
    samples = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]

    def nested(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    tensors = {
        "input_ids": nested(samples), "loss_mask": nested([torch.ones_like(each) for each in samples]),
        "temperature": torch.ones(count),
    }  # fmt: skip
    return tu.get_tensordict(tensors, {"use_dynamic_bsz": True, "max_token_len_per_gpu": MOST_TOKENS})


def engine(job: Job, path: Path, forward_only: bool) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    model = HFModelConfig(path=str(path), load_tokenizer=False, override_config={"attn_implementation": "eager"})
    model.tokenizer = SimpleNamespace(pad_token_id=0)
    settings = McoreEngineConfig(
        forward_only=forward_only, vanilla_mbridge=True, pipeline_model_parallel_size=job.pp,
        virtual_pipeline_model_parallel_size=job.chunks, use_remove_padding=True,
        override_transformer_config={"gradient_accumulation_fusion": False},
        # Without a wrapper, parameters move to the host: to where they are, on a CPU.
        param_offload=not forward_only, optimizer_offload=not forward_only,
    )  # fmt: skip
    optimizer = McoreOptimizerConfig(lr=LEARNING_RATE, lr_decay_steps=10, total_training_steps=10)
    made = MegatronEngineWithLMHead(model, settings, optimizer, CheckpointConfig())
    made.initialize()
    return made


def _hugging_face_model(job: Job) -> Path:
    from transformers import LlamaConfig

    path = job.folder / "model"
    if dist.get_rank() == 0:
        LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, vocab_size=VOCABULARY, max_position_embeddings=LONGEST,
            tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        ).save_pretrained(path)  # fmt: skip
    dist.barrier()
    return path


def _stand_in() -> None:
    """Replace what a CPU does not have, and what mbridge asks of another Megatron."""
    import mbridge.core.llm_bridge
    import mbridge.core.util
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    @functools.wraps(get_gpt_decoder_block_spec)
    def local(config: Any, use_transformer_engine: bool, **more: Any) -> Any:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", **more)
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return spec

    mbridge.core.llm_bridge.get_gpt_decoder_block_spec = local
    mbridge.core.util.ModelType = SimpleNamespace(
        encoder_or_decoder=ModelType.encoder_or_decoder, encoder_and_decoder=None
    )
    mbridge.core.Bridge.load_weights = lambda *_, **__: None
    torch.cuda.mem_get_info = lambda *_: (2**30, 2**31)
