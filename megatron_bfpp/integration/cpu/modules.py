"""CPU versions of what Megatron has for CUDA only, or only from Apex and Transformer Engine: norms, attention, experts.

Each is patched in the class or function itself, which serves every module that imported it by name.
"""

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["module_patches"]


def module_patches() -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, value) of every name that makes norms, attention and experts work on CPU tensors."""
    from megatron.core.distributed import torch_fully_sharded_data_parallel as fsdp2
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import multi_token_prediction
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    norm = _marking_sequence_parallel(WrappedTorchNorm.__new__)
    yield WrappedTorchNorm, "__new__", staticmethod(norm)
    if not transformer_engine.HAVE_TE:  # a hybrid model names it for its last norm, in every implementation
        yield transformer_engine.TENorm, "__new__", staticmethod(norm)
    yield DotProductAttention, "__init__", _without_context_parallelism(DotProductAttention.__init__)
    yield DotProductAttention, "forward", _over_the_whole_sequence(DotProductAttention.forward)
    # The wrapper for FSDP2 names CUDA.
    yield (
        fsdp2,
        "DeviceMesh",
        SimpleNamespace(from_group=lambda group, _, **more: DeviceMesh.from_group(group, "cpu", **more)),
    )
    yield token_dispatcher, "maybe_move_tensor_to_cpu", _as_numpy
    name = "is_inference_column_parallel_linear"
    if hasattr(multi_token_prediction, name):  # 0.20: asks for the type of a class that only Transformer Engine makes
        yield multi_token_prediction, name, lambda module: False
    name = "reduce_from_tensor_model_parallel_region"
    yield layers, name, _unless_alone(getattr(layers, name))


def _marking_sequence_parallel(new: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the parameters of torch's norms: finalize_model_grads then sums their gradients over tensor ranks.

    The norms themselves work on a part of the sequence as on the whole.
    """

    def norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        module: torch.nn.Module = new(cls, _changed(config, sequence_parallel=False), *args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module

    return norm


def _changed(config: Any, **values: Any) -> Any:
    config = copy.copy(config)
    for name, value in values.items():
        setattr(config, name, value)
    return config


def _without_context_parallelism(init: Callable[..., None]) -> Callable[..., None]:
    """Construct with a context-parallel size of 1, which it asserts, and then makes no use of."""

    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, _changed(config, context_parallel_size=1), *args, **kwargs)
        self.config = config

    return construct


def _over_the_whole_sequence(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Attend by gathering: the queries of this rank against the keys and values of all context-parallel ranks.

    query, key, value: [sequence / cp, micro-batch, heads, width]. Memory grows with the square of the whole sequence;
    Transformer Engine's ring does not have that, nor this simplicity.
    """
    from megatron.core.transformer.enums import AttnMaskType

    def attend(
        self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        size = self.config.context_parallel_size
        if size == 1:
            return forward(self, query, key, value, mask, *args, **kwargs)
        group = self.pg_collection.cp
        positions = zigzag_positions(query.size(0), group.rank(), size)
        key, value = (_gather_sequence(each, group) for each in (key, value))
        # A mask that came with the batch is cut to the queries.
        if mask is None and self.attn_mask_type == AttnMaskType.causal:
            mask = torch.arange(key.size(0)) > positions[:, None]  # True: not to be seen
            mask = mask[None, None]  # [1, 1, sequence / cp, sequence]
        return forward(self, query, key, value, mask, *args, **kwargs)

    return attend


def zigzag_positions(length: int, rank: int, size: int) -> torch.Tensor:
    """Return the positions of the sequence that a rank holds: chunks `rank` and `2 * size - 1 - rank` of 2 * size.

    Megatron cuts so (core/utils.py, get_batch_on_this_cp_rank) to give each rank as much of the causal triangle.
    """
    half = torch.arange(length // 2)
    return torch.cat([half + rank * (length // 2), half + (2 * size - 1 - rank) * (length // 2)])


def _gather_sequence(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Gather [sequence / cp, ...] to [sequence, ...] in the order of positions. The gradient is summed back."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    gathered = gather_from_sequence_parallel_region(part, group=group)  # rank after rank
    positions = torch.cat([zigzag_positions(part.size(0), rank, group.size()) for rank in range(group.size())])
    ordered: torch.Tensor = gathered[torch.argsort(positions)]
    return ordered


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Convert the dispatcher's counts of tokens, which it wants as numpy's; Megatron converts CUDA tensors only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _unless_alone(reduce: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Skip the reduction over a group of one rank: it returns its input, which autograd then takes for a view.

    Experts with a bias add to it in place, and torch refuses. Megatron's own linear layers have the fault on a GPU too;
    here there are no others.
    """

    def reduce_or_pass(input_: torch.Tensor, group: Any = None) -> torch.Tensor:
        return input_ if group is not None and group.size() == 1 else reduce(input_, group)

    return reduce_or_pass
