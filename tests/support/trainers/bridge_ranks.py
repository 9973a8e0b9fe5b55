"""Megatron-Bridge's own pretrain() on CPU ranks that are forked from one process, which imports it once.

Runs where scripts/test.sh has put Megatron-Bridge beside the environment: python bridge_ranks.py CASES.json
Each case is a dict with the words of `Case`; its ranks write FOLDER/NAME-RANK.json, a list of steps.
"""

import json
import multiprocessing
import os
import sys
import traceback
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# Packages that Bridge imports at its top and does not use here: 700 MB, or for GPUs only, or not in the registry.
UNUSED = [
    "datasets",
    "diffusers",
    "peft",
    "megatron.energon",
    "nvidia_resiliency_ext",
    "pulp",
    "torch.utils.tensorboard",
]


class _Anything(type):
    """The type of classes whose attributes are such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class StandIns(MetaPathFinder, Loader):
    """Finds modules that have every name, each an empty class, in place of packages that only must be importable."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_unused = any(name == each or name.startswith(each + ".") for each in UNUSED)
        return ModuleSpec(name, self, is_package=True) if is_unused else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__version__, module.__file__ = "0", "stand-in"
        module.__getattr__ = lambda name: getattr(_Anything("module", (), {}), name)


def import_bridge() -> None:
    """Import it, unmodified. Megatron-Core and ModelOpt must have seen before that there is no Transformer Engine."""
    import megatron.core.models.gpt.gpt_layer_specs

    sys.meta_path.insert(0, StandIns())
    import modelopt.torch.distill.plugins.megatron  # noqa: F401

    UNUSED.append("transformer_engine")  # megatron/bridge/peft/lora_layers.py imports it without a condition
    import megatron.bridge.training.pretrain  # noqa: F401


@dataclass(frozen=True)
class Case:
    """One job."""

    name: str
    folder: str
    schedule: str
    ranks: int = 2
    pp: int = 2
    chunks: int | None = 2  # None: no model chunks
    steps: int = 4
    save: str | None = None  # saved after each second step
    load: str | None = None  # the folder of an iteration
    is_reshardable: bool = False  # the optimizer's state fits other numbers of chunks
    clip: float = 1.0


def train(case: Case) -> list[Any]:
    """Run Bridge's pretrain() in this rank; return what each step reports, with all its bits."""
    import megatron_bfpp

    megatron_bfpp.enable(case.schedule, device="cpu")
    from megatron.bridge.training import pretrain, train
    from megatron.bridge.training.gpt_step import forward_step

    steps: list[Any] = []
    run = train.train_step

    def noting(*args: Any, **kwargs: Any) -> Any:
        report = run(*args, **kwargs)
        losses = {name: float(value).hex() for name, value in report[0].items()}
        steps.append([losses, [float(each).hex() for each in report[1:] if isinstance(each, float)]])
        return report

    train.train_step = noting
    pretrain.pretrain(configuration(case), forward_step)
    return steps


def configuration(case: Case) -> Any:
    """Return a ConfigContainer: a tiny GPT of Megatron's local layers, mock data, ZeRO-1."""
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training import config

    model = GPTModelProvider(
        num_layers=8, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, seq_length=16,
        vocab_size=64, attention_dropout=0.0, hidden_dropout=0.0, transformer_layer_spec=local_layer_spec,
        pipeline_model_parallel_size=case.pp, virtual_pipeline_model_parallel_size=case.chunks,
        pipeline_dtype=torch.float32, share_embeddings_and_output_weights=False,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
        bias_dropout_fusion=False, apply_rope_fusion=False,
        # Without it Megatron's own schedule mixes up messages on 2 ranks with chunks: megatron.training refuses that.
        overlap_p2p_comm=case.chunks is not None, batch_p2p_comm=case.chunks is None,
    )  # fmt: skip
    return config.ConfigContainer(
        model=model,
        train=config.TrainingConfig(
            train_iters=case.steps, global_batch_size=4 * case.ranks // case.pp, micro_batch_size=1
        ),
        validation=config.ValidationConfig(eval_interval=2, eval_iters=1),
        optimizer=config.OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=1e-5, use_distributed_optimizer=True, clip_grad=case.clip,
            weight_decay=0.01,
        ),
        scheduler=config.SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=0, lr_decay_iters=8, weight_decay_incr_style="constant",
            start_weight_decay=0.01, end_weight_decay=0.01,
        ),
        ddp=config.DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        ),
        dist=config.DistributedInitConfig(),
        dataset=config.MockGPTDatasetConfig(
            random_seed=1, reset_attention_mask=False, reset_position_ids=False, eod_mask_loss=False, seq_length=16,
            num_dataset_builder_threads=1, dataloader_type="single", num_workers=0,
        ),
        logger=config.LoggerConfig(log_interval=1),
        tokenizer=config.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=63),
        checkpoint=config.CheckpointConfig(
            save=case.save, load=case.load, save_interval=2, ckpt_format="torch_dist",
            dist_ckpt_optim_fully_reshardable=case.is_reshardable,
        ),
        rng=config.RNGConfig(seed=1),
    )  # fmt: skip


def _rank(case: Case, rank: int, port: int) -> None:
    os.environ |= {
        "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{case.ranks}", "LOCAL_WORLD_SIZE": f"{case.ranks}",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    try:
        steps = train(case)
        Path(case.folder, f"{case.name}-{rank}.json").write_text(json.dumps(steps), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run(case: Case) -> int:
    """Run the ranks of a case; return the number of those that failed."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(case, rank, store.port)) for rank in range(case.ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        if process.exitcode != 0:  # or None, where it hangs
            for each in processes:
                each.kill()
    return sum(process.exitcode != 0 for process in processes)


if __name__ == "__main__":
    import_bridge()
    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if failed := run(Case(**words)):
            sys.exit(f"{words['name']}: {failed} ranks failed")
        print(words["name"], "done", flush=True)
