"""Megatron's own CUDA graphs under breadth-first, on graphs that are made on a CPU (graphs.py). None ran on a GPU.

What one rank reports, sends and accumulates has the bits of the same rank without graphs, on memory that the graphs
share as on a GPU; and they are captured and replayed in the order of the rank's plan.
"""

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from graphs import CaptureError, CpuGraphs
from jobs import run_job
from megatron.core.transformer import TransformerConfig
from one_rank import LAYERS, gpt_chunks, start, train

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration import process
from megatron_bfpp.integration.flags.arguments import refuse
from megatron_bfpp.integration.flags.settings import Settings
from megatron_bfpp.integration.step.call import check_config

WARMUP = 2
has_graphs = pytest.mark.skipif(
    not hasattr(TransformerConfig, "cuda_graph_modules"), reason="refused before megatron-core 0.18"
)


def _graphs() -> CpuGraphs:
    from megatron_bfpp.integration.cpu.mode import enable_cpu

    logging.disable(logging.INFO)
    enable_cpu()
    graphs = CpuGraphs()
    graphs.install()
    return graphs


def _both(
    graphs: CpuGraphs, place: tuple[int, int, int], steps: list[int], model: dict[str, Any], **choices: Any
) -> bool:
    """Train a rank without graphs and with them; return whether all bits are equal. place: P, rank, chunks."""
    settings, found = Settings("breadth-first", **choices), []
    for config in ({}, {"cuda_graph_impl": "local", "cuda_graph_warmup_steps": WARMUP}):
        start(*place)
        graphs.reset()
        found.append(train(settings, gpt_chunks(place[2], **model, **config), steps, graphs.works))
    return all(
        len(plain) == len(graphed) and all(map(torch.equal, plain, graphed))
        for plain, graphed in zip(*found, strict=True)
    )


def _same_bits(
    pp: int, ranks: list[int], chunks: int, microbatches: int, model: dict[str, Any], choices: dict[str, Any]
) -> None:
    from megatron.core.transformer import cuda_graphs

    graphs = _graphs()
    for rank in ranks:
        reused = graphs.memory.reused
        # An evaluation with another number of micro-batches between the replays.
        steps = [microbatches, microbatches, 1 - microbatches, microbatches]
        assert _both(graphs, (pp, rank, chunks), steps, model, **choices)
        layers = LAYERS * chunks
        assert cuda_graphs._CudagraphGlobalRecord.cudagraph_created
        assert graphs.captured == graphs.expected[0] and len(graphs.captured) == 2 * layers * microbatches
        assert graphs.replayed == [[], [], *graphs.expected[1:]] and len(graphs.expected) == 3
        # Python runs once per micro-batch in the first step and in its capture, and WARMUP times before; then in the
        # evaluation, and in no other step.
        per_layer = [set(counts.values()) for counts in graphs.eager]
        assert per_layer == [set(), {(2 + WARMUP) * microbatches}, {microbatches - 1}, set()]
        assert graphs.memory.reused > reused, "no memory was shared: the order proves nothing"


@pytest.mark.slow
@has_graphs
@pytest.mark.parametrize(
    "pp, ranks, chunks, microbatches, model, choices",
    [
        (2, [0, 1], 2, 4, {"positions": "rope"}, {}),
        (2, [1], 2, 3, {"positions": "learned_absolute"}, {"backward": "late"}),
        (3, [0, 1], 2, 4, {"positions": "rope", "zero_1": True}, {"group_size": 2}),
    ],
)
def test_a_rank_keeps_its_bits_and_replays_in_the_order_of_its_plan(
    tmp_path, pp, ranks, chunks, microbatches, model, choices
):
    run_job(_same_bits, 1, tmp_path, pp, ranks, chunks, microbatches, model, choices)


def _misuse() -> None:
    """What the stand-in sees: a test of the tests, and of each part of integration/step/cuda_graphs.py."""
    from megatron_bfpp.integration.step import cuda_graphs
    from megatron_bfpp.runtime.executor import Executor

    graphs, create, run = _graphs(), cuda_graphs.create, Executor._backward

    def tried(steps=(2, 2), **changes: Any) -> bool:
        kept = {name: getattr(cuda_graphs, name) for name in changes}
        vars(cuda_graphs).update(changes)
        try:
            return _both(graphs, (2, 1, 2), list(steps), {"positions": "rope"})
        finally:
            vars(cuda_graphs).update(kept)

    assert tried(create=lambda *_: None) and not graphs.captured  # nothing is captured: the claims above fail

    def early(executor: Any, action: Any) -> None:
        run(executor, action)
        create(SimpleNamespace(forward_only=False), SimpleNamespace(cuda_graph_impl="local"))

    with pytest.raises(CaptureError, match="a message is pending"):
        Executor._backward = early
        tried()
    Executor._backward = run
    with pytest.raises(CaptureError, match="watchdog"):
        tried(process=SimpleNamespace(ACTIVITY=SimpleNamespace(end=lambda: None)))
    with pytest.raises(AssertionError, match="free a view"):
        tried(output_of=lambda output: output)
    # All micro-batches share the rotary embeddings, which 0.19 takes for an error.
    with pytest.raises(AssertionError) if process.versions()["megatron-core"] >= "0.19" else nullcontext():
        tried(before_forward=lambda chunk: None)
    tried((2, 2, -1, 2), _without=lambda managers: nullcontext())
    assert graphs.replayed[-1] != graphs.expected[-1], "the evaluation has moved the graphs on"
    with pytest.raises(ValueError, match=r"this step has 3 micro-batches, .* of a step with 2"):
        tried((2, 3))


@pytest.mark.slow
@has_graphs
def test_every_part_is_needed(tmp_path):
    run_job(_misuse, 1, tmp_path)


@pytest.mark.parametrize(
    "flag, batch", [("--rampup-batch-size", [2, 2, 8]), ("--step-batch-size-schedule", "0:2 1K:8")]
)
def test_a_batch_that_grows_is_refused_before_the_model(flag, batch):
    args = SimpleNamespace(
        pipeline_model_parallel_size=2, cuda_graph_impl="local", cuda_graph_modules=[], global_batch_size=8
    )
    setattr(args, flag[2:].replace("-", "_"), batch)
    with pytest.raises(UserError, match=f"one number of micro-batches.\n .* leave out {flag}"):
        refuse(args, Settings("breadth-first"))


def test_a_configuration_without_a_command_line_is_refused_too():
    others = {"overlap_moe_expert_parallel_comm": False}
    check_config(SimpleNamespace(cuda_graph_impl="local", cuda_graph_modules=[], **others))
    for graphs in ({"cuda_graph_impl": "local"}, {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []}):
        with pytest.raises(ValueError, match=f"{graphs['cuda_graph_impl']} does not work .* none, or from"):
            check_config(SimpleNamespace(**graphs, **others))


def test_a_megatron_whose_graphs_lose_inputs_is_refused():
    args = SimpleNamespace(pipeline_model_parallel_size=2, cuda_graph_impl="local", global_batch_size=8)
    with pytest.raises(UserError, match=r"before megatron-core 0\.18 .*\n .*0\.18 or later"):
        refuse(args, Settings("breadth-first"))
