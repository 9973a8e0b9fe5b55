"""Deferred weights' gradients in the planner: their time, their lags, their memory, the flags that name them."""

import gc
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import replace

import pytest
from test_time import BIG, cases

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.planner.activations import Activations
from megatron_bfpp.planner.flags import gpt_of, parse, strategy_of
from megatron_bfpp.planner.hardware import load_gpu
from megatron_bfpp.planner.memory import PRECISIONS, memory
from megatron_bfpp.planner.model import GPT, Split
from megatron_bfpp.planner.steps import formula_step, replay_step
from megatron_bfpp.planner.strategy import DEFERRED, Strategy
from megatron_bfpp.planner.time import durations
from megatron_bfpp.schedule.costs import times_of
from megatron_bfpp.schedule.ir import Op
from megatron_bfpp.schedule.plan import lags_for


def test_the_formula_with_deferred_gradients_ranks_and_the_replay_decides():
    apart = []
    for plain, times in cases("breadth-first", 60):
        split = replace(times, weights=[each / 2 for each in times.backward])
        strategy = replace(plain, schedule=DEFERRED, times=(1.0, split.weights[0], split.weights[0]))
        exact, formula = replay_step(strategy, split), formula_step(strategy, split)
        is_full = strategy.num_microbatches >= strategy.pp
        assert formula.step == pytest.approx(exact.step, rel=0.08 if is_full else 0.2), (strategy, times)
        apart.append(abs(formula.step / exact.step - 1))
        if not times.gather and not times.reduction and is_full:
            assert exact.step <= replay_step(plain, times).step * 1.0001, (strategy, times)
    assert sum(apart) / len(apart) < 0.02


def test_a_w_is_one_product_of_each_linear_layer_and_the_rest_of_a_backward_its_i():
    gpu, strategy = load_gpu("a100-80"), Strategy(DEFERRED, 4, 8, 2, 4, 1, 8, 8)
    plain, full = (durations(BIG, replace(strategy, recompute=each), gpu, "bf16") for each in ("none", "full"))
    linear = 4 * sum(
        gpu.gemm_s(gemm, "bf16") for gemm in BIG.layers[0].gemms(1024, Split(8))
    )  # of the 4 layers of a stage
    head = gpu.gemm_s(BIG.head_gemm(1, Split(8)), "bf16")
    assert plain.weights == full.weights == pytest.approx([linear] * 15 + [linear + head])
    assert durations(replace(BIG, untied=False), strategy, gpu, "bf16").weights[-1] == pytest.approx(linear)
    assert linear < plain.forward[0] < plain.backward[0] - linear  # attention, norms and tensor parallelism are in I
    whole = replace(strategy, schedule="breadth-first")
    assert replay_step(strategy, plain).step < replay_step(whole, plain).step
    assert replay_step(strategy, plain).busy == replay_step(whole, plain).busy


def test_the_lags_are_those_that_the_plugin_chooses():
    forward, inputs, weights = BIG.times("none")
    sizes = Namespace(hidden_size=8192, seq_length=1024, num_attention_heads=64, ffn_hidden_size=4 * 8192)
    assert (forward, inputs, weights) == times_of(sizes)
    strategy = Strategy(DEFERRED, 8, 1, 1, 4, 1, 16, 16, times=BIG.times("none"))
    chosen, _ = lags_for("deferred", strategy.shape, None, True, None, strategy.hop, times_of(sizes))
    assert strategy.chosen_lags() == chosen
    assert all(each <= most for each, most in zip(chosen, strategy.most_lags, strict=True))
    assert max(replace(strategy, weight_lag=3).chosen_lags()) == 3


FLAGS = [
    "--num-layers",
    "32",
    "--hidden-size",
    "1024",
    "--num-attention-heads",
    "16",
    "--seq-length",
    "1024",
    "--vocab-size",
    "5000",
    "--pipeline-model-parallel-size",
    "4",
    "--num-virtual-stages-per-pipeline-rank",
    "4",
    "--pipeline-schedule",
    "breadth-first",
    "--breadth-first-weight-gradients",
]


@pytest.mark.parametrize(
    ("more", "schedule", "lag"),
    [
        (["with-backward", "--global-batch-size", "4"], "breadth-first", None),
        (["deferred", "--global-batch-size", "4"], DEFERRED, None),
        (["deferred", "--global-batch-size", "4", "--breadth-first-weight-lag", "2"], DEFERRED, 2),
        (["auto", "--global-batch-size", "4"], DEFERRED, None),
        (["auto", "--global-batch-size", "200"], "breadth-first", None),
    ],
)
def test_flags_name_a_split_backward(more, schedule, lag):
    flags = parse([*FLAGS, *more])
    strategy = strategy_of(flags, 4)
    assert (strategy.schedule, strategy.weight_lag) == (schedule, lag)
    assert not strategy.is_split or strategy.times == gpt_of(flags).times("none")


def test_a_late_split_backward_is_not_planned():
    with pytest.raises(UserError, match="does not know breadth-first-late-deferred"):
        strategy_of(parse([*FLAGS, "deferred", "--global-batch-size", "4", "--breadth-first-backward", "late"]), 4)


@pytest.mark.parametrize("owed", [0.5, 1.0, 1.7, 2.5, 16.0])
@pytest.mark.parametrize("lag", [None, 0, 1, 3])
@pytest.mark.parametrize(
    ("pp", "chunks", "microbatches", "group"),
    [
        (2, 2, 4, 2),
        (4, 2, 8, 4),
        (4, 4, 8, 8),
        (4, 3, 2, 2),
        (2, 3, 12, 12),
        (8, 2, 32, 16),
        (8, 4, 8, 8),
        (8, 2, 1, 1),
    ],
)
def test_what_a_rank_holds_at_most_is_what_its_order_makes(pp, chunks, microbatches, group, lag, owed):
    strategy = Strategy(DEFERRED, pp, 1, 1, chunks, 1, microbatches, group, hop=0.0, weight_lag=lag)
    for rank, actions in enumerate(strategy.order()):
        held, most = 0.0, 0.0
        for action in actions:
            held += {Op.F: 1.0, Op.I: owed - 1.0, Op.W: -owed}[action.op]
            most = max(most, held)
        live, owing = strategy.peak_owing(rank, 1.0, owed)
        assert live + owing * owed == pytest.approx(most), (rank, live, owing)


def test_a_layer_owes_nearly_all_that_it_keeps_without_recomputation():
    gpt, sbh = replace(BIG, attention_dropout=0.0), 1024 * 8192
    whole = Activations(gpt, 1, 1, False, 2, flash_attention=True)
    assert whole.owed() == 32 * sbh and whole.owed() / whole.layer("none") == pytest.approx(32 / 34, rel=0.03)
    assert whole.owed() / whole.layer("full") == 16
    # With TP 8 and sequence parallelism: of 16 h, 2 are split along the sequence, 12 by heads or MLP, and the gradients
    # of the two outputs of h, which the I gathers, are whole.
    parted = Activations(gpt, 1, 8, True, 2, flash_attention=True)
    assert parted.owed() == pytest.approx(2 * sbh * (2 / 8 + 12 / 8 + 2))
    assert replace(parted, sequence_parallel=False).owed() == pytest.approx(2 * sbh * (2 + 12 / 8 + 2))


def test_what_is_owed_is_counted_beside_the_activations():
    strategy = Strategy(DEFERRED, 4, 2, 8, 4, 1, 8, 8, "zero1", hop=0.0)
    for rank in (0, 3):
        split, plain = (
            memory(BIG, replace(strategy, schedule=each), PRECISIONS["bf16"], True, rank)
            for each in (DEFERRED, "breadth-first")
        )
        assert plain.owed == 0 and split.owed > 0 and split.activations <= plain.activations
        state = split.parameters + split.gradients + split.optimizer
        assert split.total == state + split.activations + split.owed + split.messages + split.working


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_is_owed_is_what_megatrons_layers_keep(tmp_path, recompute):
    pytest.importorskip("megatron.core")
    from jobs import run_job

    run_job(_owed_bytes, 1, tmp_path, recompute)


def _owed_bytes(recompute):
    from chunks import MICRO_BATCH, SEQUENCE
    from one_rank import HIDDEN, LAYERS, VOCABULARY, gpt_chunks, start, train

    from megatron_bfpp.integration.cpu.mode import enable_cpu
    from megatron_bfpp.integration.flags.settings import Settings
    from megatron_bfpp.runtime.weight_gradients import OwedGradients

    freed, pay = {0: [], 1: []}, OwedGradients.pay
    enable_cpu()
    start(2, 1, 2)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = gpt_chunks(2, "rope", **(full if recompute == "full" else {}))
    with storages() as alive:

        def counting(self, chunk, microbatch):
            before = alive()
            pay(self, chunk, microbatch)
            after = alive()
            freed[chunk].append(sum(size for storage, size in before.items() if storage not in after))

        OwedGradients.pay = counting
        train(Settings("breadth-first", weight_gradients="deferred"), model, [4], [])
    gpt = GPT(8, HIDDEN, 2, SEQUENCE, VOCABULARY, make_vocab_size_divisible_by=VOCABULARY, untied=True)
    live = Activations(gpt, MICRO_BATCH, 1, False, 4, flash_attention=False)
    expected = {0: LAYERS * live.owed(), 1: LAYERS * live.owed() + live.owed_head()}
    # What a W frees. On chunk 0 less the received gradient, which the executor holds a little longer.
    assert freed == {chunk: [pytest.approx(size, rel=0.05)] * 4 for chunk, size in expected.items()}


@contextmanager
def storages():
    """Follow every storage that an operation makes. Yields a function: those that are alive, with their bytes."""
    from torch import Tensor
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    made = {}  # number -> storage, bytes

    class Following(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            for storage in (each.untyped_storage() for each in tree_iter(result) if isinstance(each, Tensor)):
                reference = StorageWeakRef(storage)
                if reference.cdata not in made or made[reference.cdata][0].expired():
                    made[reference.cdata] = reference, storage.nbytes()
            return result

    def alive():
        gc.collect()
        return {number: size for number, (reference, size) in made.items() if not reference.expired()}

    with Following():
        yield alive
