"""--use-torch-fsdp2 lifts one assertion of Megatron and no other; what cannot be sharded is refused."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from megatron.training import arguments

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.flags import fully_sharded
from megatron_bfpp.integration.flags.settings import Settings
from megatron_bfpp.integration.relied_on.training import NO_PIPELINE
from megatron_bfpp.integration.seams import SeamError
from megatron_bfpp.integration.step.fully_sharded_seams import _load_values, with_every_layer


def messages(function):
    return {constant for constant in function.__code__.co_consts if isinstance(constant, str)}


def test_one_assertion_of_megatron_is_lifted_for_one_call():
    validate = arguments.validate_args
    code, before = validate.__code__, messages(validate)
    with pytest.raises(ZeroDivisionError), NO_PIPELINE.removed_from(validate):
        assert before - messages(validate) == {"--use-torch-fsdp2 is not supported with pipeline parallelism"}
        assert messages(validate) < before
        assert validate.__code__.co_firstlineno == code.co_firstlineno
        raise ZeroDivisionError
    assert validate.__code__ is code


def test_a_megatron_with_other_assertions_is_named():
    def validate_args(args):
        if args.use_torch_fsdp2:
            assert args.pipeline_model_parallel_size <= 1

    with pytest.raises(SeamError, match="validate_args has 0 assertions"), NO_PIPELINE.removed_from(validate_args):
        pass


FSDP2 = {"use_torch_fsdp2": True, "pipeline_model_parallel_size": 2}
SAVED = {**FSDP2, "save": "saved"}


@pytest.mark.parametrize(
    "args, settings, words",
    [
        (FSDP2, {"engine": "megatron"}, ("--use-torch-fsdp2", "--breadth-first-engine plan")),
        ({**FSDP2, "ckpt_format": "torch_dcp"}, {}, ("--ckpt-format torch_dcp", "--ckpt-format torch_dist")),
        ({**SAVED, "num_experts": 2}, {}, ("cannot save or load experts", "leave out --save and --load")),
        (
            {**SAVED, "num_experts": 2, "hybrid_override_pattern": "*E|M-"},
            {},
            ("cannot save or load experts and Mamba layers",),
        ),
        ({**SAVED, "hybrid_layer_pattern": "M-|*-", "hybrid_override_pattern": "M-|*-"}, {}, ("load Mamba layers",)),
        ({**SAVED, "num_experts": 2, "hybrid_layer_pattern": "*-|*-/M"}, {}, ("cannot save or load Mamba layers",)),
        ({**SAVED, "hybrid_layer_pattern": "*-|G-"}, {}, ("cannot save or load gated delta nets",)),
        ({**SAVED, "experimental_attention_variant": "gated_delta_net"}, {}, ("load gated delta nets",)),
        ({}, {"resident_chunks": 2}, ("--breadth-first-resident-chunks is 2", "add --use-torch-fsdp2")),
    ],
)
def test_what_breadth_first_cannot_shard(args, settings, words):
    with pytest.raises(UserError) as refusal:
        fully_sharded.refuse(SimpleNamespace(**args), Settings(schedule="breadth-first", **settings))
    assert all(word in str(refusal.value) for word in words) and str(refusal.value).count("\n") <= 2


@pytest.mark.parametrize("chunks", [0, -1])
def test_no_chunk_runs_without_a_place(chunks):
    with pytest.raises(UserError, match=f"--breadth-first-resident-chunks is {chunks}"):
        Settings(resident_chunks=chunks)


def test_gated_layers_are_not_saved_by_a_megatron_that_mixes_up_their_halves(monkeypatch):
    from megatron.core.transformer import mlp

    args, settings = SimpleNamespace(**FSDP2, swiglu=True, save="folder"), Settings(schedule="breadth-first")
    monkeypatch.setattr(mlp, "apply_swiglu_sharded_factory", lambda tensor, dp_group=None: tensor)
    fully_sharded.refuse(args, settings)
    monkeypatch.setattr(mlp, "apply_swiglu_sharded_factory", lambda tensor: tensor)
    with pytest.raises(UserError, match="--swiglu"):
        fully_sharded.refuse(args, settings)
    args.save = None
    fully_sharded.refuse(args, settings)


@pytest.mark.parametrize("flag", ["use_torch_fsdp2", "use_megatron_fsdp"])
def test_1f1b_shards_without_pipeline_ranks_only(flag):
    for ranks in (2, 1):
        args = SimpleNamespace(**{flag: True}, pipeline_model_parallel_size=ranks)
        if ranks == 1:
            fully_sharded.refuse_under_1f1b(args)
        else:
            with pytest.raises(UserError, match=r"Use .*--pipeline-schedule breadth-first"):
                fully_sharded.refuse_under_1f1b(args)


def test_a_resumed_optimizer_gets_its_values_and_keeps_its_tensors():
    import torch

    weight = torch.nn.Parameter(torch.zeros(2))
    inner = torch.optim.AdamW([weight], lr=1.0)
    weight.grad = torch.ones(2)
    inner.step()
    moments = inner.state[weight]["exp_avg"]
    pair = SimpleNamespace(optimizer=inner, _filter_and_reorder_param_groups=lambda own, saved: saved)
    saved = {"param_groups": [{"params": [0], "lr": 0.5, "step": 7}], "state": {"common_step": torch.tensor(7.0)}}
    for state in (saved, {"optimizer": saved, "fp32_from_fp16_params": []}):
        _load_values(pair, state)
        assert inner.param_groups[0]["lr"] == 0.5 and inner.param_groups[0]["params"] == [weight]
        assert inner.state[weight]["step"] == 7 and inner.state[weight]["exp_avg"] is moments


def test_an_object_that_holds_parameters_has_those_that_take_their_place():
    class Holder:
        def __init__(self, weight, size):
            self.weight_of_layer, self.size = weight, size

    class Layer(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.held, self.alone = Holder(self.weight, 2), Holder(torch.nn.Parameter(torch.ones(1)), 1)

    def shard(self, module):
        for each in (chunk[0], chunk[1]):
            each.weight = torch.nn.Parameter(torch.zeros(2, 1))

    chunk = torch.nn.Sequential(Layer(), Layer())
    alone = chunk[0].alone.weight_of_layer
    with_every_layer(shard, None, module=chunk)
    for layer in chunk:
        assert layer.held.weight_of_layer is layer.weight and layer.held.size == 2
        assert isinstance(layer.held, Holder) and type(layer.held) is not Holder
    assert chunk[0].alone.weight_of_layer is alone and type(chunk[0].alone) is Holder


def test_layers_that_megatrons_wrapper_does_not_know_are_sharded_one_by_one():
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class Known(TransformerLayer):
        def __init__(self):
            torch.nn.Module.__init__(self)

    class Stack(torch.nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

    inner = Stack(torch.nn.Linear(2, 2), Known())
    chunk = Stack(torch.nn.Linear(2, 2), inner, Known())
    with_every_layer(lambda self, module: None, None, chunk)
    assert chunk._fsdp_modules == inner._fsdp_modules == [torch.nn.Linear]
    other = Stack(Known())
    with_every_layer(lambda self, module: None, None, other)
    assert not hasattr(other, "_fsdp_modules")
