"""What Megatron really allocates on a CPU: bytes of parameters, gradients, optimizer state and saved activations."""

import json
import os
import sys
from pathlib import Path

import gpt
import jobs
import kernels
import torch

MARK = "MEASURED "


def measure(folder: Path, ranks: int, *flags: str) -> list[dict]:
    """Start a training job and measure instead of training; one dict of bytes for each rank."""
    arguments = [*gpt.MODEL, "--global-batch-size", "4", "--no-create-attention-mask-in-dataloader", *flags]
    outputs = jobs.run_job(gpt.pretrain, ranks, folder, str(folder / "steps.jsonl"), arguments, _measure_instead)
    lines = [[line for line in output.splitlines() if line.startswith(MARK)] for output in outputs]
    return [json.loads(found[0].removeprefix(MARK)) for found in lines]


def saved(folder: Path, *flags: str) -> int:
    """Start a training job of one rank, and return the bytes that the forward of a micro-batch saves, as the flags
    recompute.
    """
    arguments = [*gpt.MODEL, "--global-batch-size", "4", "--no-create-attention-mask-in-dataloader", *flags]
    (output,) = jobs.run_job(gpt.pretrain, 1, folder, str(folder / "steps.jsonl"), arguments, _save_instead)
    (line,) = [line for line in output.splitlines() if line.startswith(MARK)]
    return json.loads(line.removeprefix(MARK))


def _save_instead() -> None:
    kernels.stand_in()
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.training import training

    init = DotProductAttention.__init__

    def build(self, *args, **kwargs):
        # Of latent attention, whose heads are as wide here for keys as for values: --kv-channels.
        init(self, *args, **{name: value for name, value in kwargs.items() if name not in ("k_channels", "v_channels")})

    DotProductAttention.__init__ = build
    training.train = lambda *given, **more: _save(*given, **more)  # as a wrapper: its seam cannot look behind it


def _save(forward_step, model, optimizer, scheduler, iterator, *args, **kwargs) -> None:
    known, kept = _bytes(model[0].parameters()), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = forward_step(iterator[0] if type(iterator) is list else iterator, model[0])
        output.float().sum()
    found = _bytes(kept)  # at the end: recomputation frees what it has saved
    print("\n" + MARK + json.dumps(sum(size for place, size in found.items() if place not in known)), flush=True)
    sys.stderr.flush()
    os._exit(0)


def _measure_instead() -> None:
    from megatron.training import training

    training.train = lambda *given, **more: _train(*given, **more)  # likewise


def _train(forward_step, model, optimizer, scheduler, iterator, *args, **kwargs) -> None:
    from megatron.training import get_args, training

    parameters = _bytes(parameter for chunk in model for parameter in chunk.parameters())
    gradients = _bytes(buffer.grad_data for chunk in model for buffer in chunk.buffers)
    found = {"parameters": sum(parameters.values()), "gradients": sum(gradients.values())}
    if torch.distributed.get_world_size() == 1:
        found["flops"] = training.num_floating_point_operations(get_args(), 4)
        for recompute in ("none", "selective", "full"):
            found[recompute] = _saved_by_forward(
                forward_step, model[0], iterator[0] if type(iterator) is list else iterator, recompute
            )
    for chunk in model:
        for buffer in chunk.buffers:
            buffer.grad_data.fill_(1e-3)
    optimizer.step()
    state = _bytes(_state_of(optimizer))
    found["optimizer"] = sum(size for place, size in state.items() if place not in parameters | gradients)
    print("\n" + MARK + json.dumps(found), flush=True)
    sys.stderr.flush()
    torch.distributed.barrier()  # nobody leaves while another still talks to it
    os._exit(0)


def _bytes(tensors) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _state_of(optimizer):
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in each.optimizer.param_groups:
            yield from group["params"]
        for values in each.optimizer.state.values():
            yield from (value for value in values.values() if torch.is_tensor(value))


def _saved_by_forward(forward_step, model, iterator, recompute: str) -> int:
    """Bytes of all storages that autograd keeps for the backward of one micro-batch, but for the parameters."""
    config = model.module.config if hasattr(model.module, "config") else model.config
    config.recompute_granularity = None if recompute == "none" else recompute
    config.recompute_method, config.recompute_num_layers = ("uniform", 1) if recompute == "full" else (None, None)
    for module in model.modules():
        module.config = config if hasattr(module, "config") else None
        if hasattr(module, "checkpoint_core_attention"):
            module.checkpoint_core_attention = recompute == "selective"
    known, saved, kept = _bytes(model.parameters()), {}, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.update(_bytes([tensor]))
        kept.append(tensor)  # else its place may be taken by the next
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = forward_step(iterator, model)
        loss = output.float().sum()
    saved_bytes = sum(size for place, size in saved.items() if place not in known)
    loss.backward()  # lets go of what recomputation keeps
    return saved_bytes
