"""A split backward of Transformer Engine's layers: Megatron's own wrappers, made of stand-ins for them (engine.py)."""

import json
import logging
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

import engine
from gpt import MODEL, UNTIED, ZERO_1, flags_of
from jobs import run_job

# Nothing here may import Megatron at the top: the ranks forget the Megatron that has looked for Transformer Engine.
pytestmark = pytest.mark.slow

NEW, OLD = True, False  # a layer asks its store in the forward too, since 2.16, or in the backward only
LINEARS = 4  # of a layer: qkv, projection and the two of the MLP
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = {"num_moe_experts": 3, "moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall"}


def _with_engine(is_new: bool) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in ("megatron", "megatron_bfpp", "one_rank"):
            del sys.modules[name]
    engine.install(is_new)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    from megatron_bfpp.integration.cpu.mode import enable_cpu

    enable_cpu()


def _chunks(**config: Any) -> list[Any]:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from one_rank import gpt_chunks

    experts = config.get("num_moe_experts")
    layer = get_gpt_layer_with_transformer_engine_spec(num_experts=experts, moe_grouped_gemm=experts is not None)
    return gpt_chunks(2, "rope", layer=layer, **config)


def _trained(rank: int, steps: list[int], lag: int | None, prepare: Any, **config: Any) -> tuple[list[Any], int]:
    """What a rank of 2, with 2 chunks, reports, sends and accumulates, and how many gradients were owed.

    lag: of every rank; None for whole backwards. prepare: changes a layer.
    """
    from one_rank import start, train

    from megatron_bfpp.integration.flags.settings import Settings
    from megatron_bfpp.runtime.weight_gradients import OwedGradients
    from megatron_bfpp.schedule.plan import plan_of

    @dataclass(frozen=True)
    class WithLag(Settings):
        def plan_of(self, shape, evaluation=False, is_sharded=False, is_ahead=True):
            lags = None if lag is None or evaluation else (lag,) * shape.pp_size
            return plan_of(shape, None, True, evaluation, None, self.hop, lags)

    owed, owe = [], OwedGradients.owe
    OwedGradients.owe = lambda self, weight, gradient: (owed.append(weight), owe(self, weight, gradient))
    try:
        start(2, rank, 2)
        model = _chunks(**config)
        for module in (module for chunk in model for module in chunk.modules()):
            if isinstance(module, engine.Base):
                prepare(module)
        seen = train(WithLag("breadth-first"), model, steps, [])
    finally:
        OwedGradients.owe = owe
    stores = [module.wgrad_store for chunk in model for module in chunk.modules() if isinstance(module, engine.Base)]
    assert stores and all(type(store) is engine.WeightGradStore for store in stores), "the layers have theirs again"
    return seen, len(owed)


def _same_bits(lag: int, owed: int | None = None, rank: int = 1, prepare: Any = lambda layer: None, **config: Any):
    """Compare all bits of a rank with whole and with split backwards. owed: in a micro-batch of a chunk."""
    steps = [4, -2, 3]  # micro-batches; the second is an evaluation
    whole, none = _trained(rank, steps, None, prepare, **config)
    split, found = _trained(rank, steps, lag, prepare, **config)
    output_layer = 7 * (rank == 1)  # Megatron's own, once in each micro-batch
    assert none == 0 and (owed is None or found == 14 * owed + output_layer), (found, owed)
    numbers = [number for step in split for number in step]
    assert all(bool(number.isfinite().all()) for number in numbers) and any(bool(number.any()) for number in numbers)
    assert all(len(one) == len(other) > 0 for one, other in zip(whole, split, strict=True))
    assert all(all(map(torch.equal, one, other)) for one, other in zip(whole, split))


@pytest.mark.parametrize("is_new", [NEW, OLD])
def test_every_gradient_has_the_bits_of_a_whole_backward(is_new, tmp_path):
    run_job(_every_gradient, 1, tmp_path, is_new)


def _every_gradient(is_new: bool) -> None:
    from one_rank import LAYERS

    _with_engine(is_new)
    # The product of qkv and fc1 gives their biases' gradients too; those of the other two are added behind it.
    linears, biases = LINEARS * LAYERS, LAYERS
    for fused in (True, False):
        for lag in (0, 1, 8):
            _same_bits(lag, linears, gradient_accumulation_fusion=fused, add_bias_linear=False)
        _same_bits(1, linears + biases, rank=0, gradient_accumulation_fusion=fused, add_qkv_bias=True)
        _same_bits(1, gradient_accumulation_fusion=fused, zero_1=True, normalization="RMSNorm", **FULL)


def test_experts_are_owed_together_and_whole_without_fusion(tmp_path):
    run_job(_experts, 1, tmp_path)


def _experts() -> None:
    from one_rank import LAYERS

    _with_engine(NEW)
    for fused, experts in ((True, 2 * 3), (False, 0)):
        config = {"gradient_accumulation_fusion": fused, "add_bias_linear": False, **EXPERTS}
        _same_bits(1, LAYERS * (2 + experts), **config)


def test_in_fp8_a_bias_has_its_gradient_from_the_i(tmp_path):
    run_job(_fp8, 1, tmp_path)


def _fp8() -> None:
    _with_engine(NEW)

    def in_fp8(layer: Any) -> None:
        layer.fp8 = True

    _same_bits(1, prepare=in_fp8, gradient_accumulation_fusion=True, add_qkv_bias=True)


def test_the_layers_that_cannot_wait_stay_whole_and_are_named(tmp_path):
    run_job(_whole_layers, 1, tmp_path)


def _whole_layers() -> None:
    from one_rank import LAYERS, start

    _with_engine(NEW)
    from megatron_bfpp.integration.step.weight_gradients import splittable

    def whole(change: Any, **config: Any) -> tuple[list[str], int]:
        start(2, 0, 2)
        chunk = _chunks(gradient_accumulation_fusion=True, **config)[1]
        layer = chunk.module.decoder.layers[0]
        change(layer.mlp)
        weights, names = splittable(chunk)
        short = [name.removeprefix("module.decoder.layers.") for name in names]
        assert all(name.startswith("module.decoder.layers.") for name in names)
        return short, len(weights)

    def userbuffers(mlp: Any) -> None:
        mlp.linear_fc1.ub_overlap_ag = True

    def delays(mlp: Any) -> None:
        mlp.linear_fc1.wgrad_store = engine.WeightGradStore(True)

    def distributed(mlp: Any) -> None:
        mlp.linear_fc1.weight.is_distributed_weight = True

    def shared(mlp: Any) -> None:
        mlp.other = torch.nn.Embedding(2, 2)
        mlp.other.weight = mlp.linear_fc1.weight

    def old(mlp: Any) -> None:
        del mlp.linear_fc1.wgrad_store

    all_but_one = LINEARS * LAYERS - 1
    for change in (userbuffers, delays, distributed, shared, old):
        assert whole(change) == (["0.mlp.linear_fc1"], all_but_one), change

    def frozen(mlp: Any) -> None:
        mlp.linear_fc1.weight.requires_grad = False

    def fused(mlp: Any) -> None:
        mlp._fused_impl = None  # as in a TEFusedMLP, whose operations take the weights of its layers

    def biased(mlp: Any) -> None:
        mlp.experts.linear_fc1.use_bias = True

    assert whole(frozen) == ([], all_but_one)
    assert whole(fused) == (["0.mlp.linear_fc1", "0.mlp.linear_fc2"], all_but_one - 1)
    experts = LAYERS * (2 + 2 * 3)
    assert whole(biased, add_bias_linear=False, **EXPERTS) == (["0.mlp.experts.linear_fc1"], experts - 3)


@pytest.mark.parametrize("experts", [{}, EXPERTS])
def test_the_bytes_that_wait_are_those_of_the_line_at_start(experts, tmp_path):
    run_job(_bytes, 1, tmp_path, experts)


def _bytes(experts: dict[str, Any]) -> None:
    _with_engine(NEW)
    from chunks import MICRO_BATCH, SEQUENCE
    from one_rank import start

    from megatron_bfpp.integration.step import transformer_engine
    from megatron_bfpp.integration.step.weight_gradients import owed_bytes

    given, put = [], transformer_engine._Store.put

    def counting(self: Any, tensors: Any, function: Any) -> None:
        flat = [each for some in tensors[:2] for each in (some if isinstance(some, tuple) else [some])]
        given.append(sum(each.numel() * each.element_size() for each in flat))
        put(self, tensors, function)

    transformer_engine._Store.put = counting
    config = {"gradient_accumulation_fusion": True, "add_bias_linear": False, **experts}
    _trained(0, [1], 0, lambda layer: None, **config)  # of rank 0, which does not have the output layer
    start(2, 0, 2)
    chunks = _chunks(**config)
    expected = sum(owed_bytes(chunk, chunk.config, SEQUENCE * MICRO_BATCH) for chunk in chunks)
    assert sum(given) == expected > 0


def test_a_release_that_leaves_nothing_to_the_stores_is_told(tmp_path):
    run_job(_unknown_release, 1, tmp_path)


def _unknown_release() -> None:
    _with_engine(NEW)
    engine.Base.store = lambda self: (self.wgrad_store.delay_wgrad_compute(), None)[1]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _same_bits(1, owed=0, gradient_accumulation_fusion=True)
    lines = {str(each.message) for each in told if "Transformer Engine" in str(each.message)}
    assert len(lines) == 1 and lines.pop().startswith("megatron_bfpp: none of 16 layers of Transformer Engine")


BREADTH_FIRST = ("--pipeline-schedule", "breadth-first")
# TP, DP, flags, what is compared with (Megatron's default has no pipeline with FSDP2), linears beside those of 4 layers
JOBS = {
    "mtp": (1, 1, ("--position-embedding-type", "rope", "--mtp-num-layers", "1", "--bf16", *ZERO_1), (), 1 + LINEARS),
    "tensor_parallel": (2, 1, ("--overlap-grad-reduce", "--swiglu"), (), 0),
    "sequence_parallel": (2, 1, ("--overlap-grad-reduce", "--sequence-parallel"), (), 0),
    "fully_sharded": (
        *(1, 2, ("--use-torch-fsdp2", "--no-gradient-accumulation-fusion", "--ckpt-format", "torch_dist", *UNTIED)),
        *(BREADTH_FIRST, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", JOBS)
def test_a_job_has_the_losses_of_whole_backwards(case, tmp_path):
    tp, dp, flags, reference, more = JOBS[case]
    flags += flags_of(2, 2, tp, dp, 4)
    steps, none = _job(tmp_path, 2 * tp * dp, *flags, *reference)
    assert len({step["lm loss hex"] for step in steps}) == 3 and "grad norm hex" in steps[0]
    deferred = _job(tmp_path, 2 * tp * dp, *flags, *BREADTH_FIRST, "--breadth-first-weight-gradients", "deferred")
    assert deferred[0] == steps
    products = 3 * 4  # steps, micro-batches
    assert set(none) == {0} and set(deferred[1]) == {4 * LINEARS * products, (4 * LINEARS + more) * products}


def _job(folder: Any, ranks: int, *flags: str) -> tuple[list[dict[str, str]], list[int]]:
    """Train with Transformer Engine's layers.

    Return all bits of each step's losses and gradient norms, and how many products each rank has put off.
    """
    log = folder / "steps.jsonl"
    log.unlink(missing_ok=True)
    flags += ("--transformer-impl", "transformer_engine")
    outputs = run_job(_pretrain, ranks, folder, str(log), [*MODEL, *flags])
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    bits = [{name: value for name, value in step.items() if name.endswith(" hex")} for step in steps]
    return bits, [int(re.findall(r"products put off: (\d+)", output)[-1]) for output in outputs]


def _pretrain(log: str, flags: list[str]) -> None:
    import gpt

    _with_engine(NEW)
    from megatron_bfpp.integration.cpu import arguments
    from megatron_bfpp.integration.step import transformer_engine

    kept = ("transformer_impl", "gradient_accumulation_fusion")
    arguments._CHANGES = tuple(change for change in arguments._CHANGES if change[0] not in kept)
    count, put = [0], transformer_engine._Store.put

    def counting(self: Any, *args: Any) -> None:
        count[0] += 1
        put(self, *args)

    transformer_engine._Store.put = counting
    gpt.pretrain(log, flags)
    print(f"products put off: {count[0]}", flush=True)
