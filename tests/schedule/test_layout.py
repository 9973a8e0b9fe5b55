"""Layouts of layers that do not divide are complete, as even as can be, and read so by Megatron's own parser."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("megatron.core")

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_bfpp.schedule.model.layout import layers_of_stages, layout_of, other_layers


@st.composite
def uneven(draw):
    pp_size, chunks = draw(st.integers(2, 16)), draw(st.integers(2, 8))
    return draw(st.integers(pp_size * chunks, 6 * pp_size * chunks)), pp_size, chunks, draw(st.integers(0, 3))


@settings(deadline=None)
@given(uneven())
def test_the_layout_holds_every_layer_once_in_megatrons_eyes(case):
    num_layers, pp_size, chunks, mtp_layers = case
    layers = layers_of_stages(*case)
    assert sum(layers) == num_layers and len(layers) == pp_size * chunks and min(layers) >= 1
    layout = PipelineParallelLayerLayout(layout_of(layers, mtp_layers), pp_size)
    assert not layout.validate_layer_layout(num_layers, mtp_layers or None), "MTP layers away from the loss"
    assert layout.virtual_pipeline_model_parallel_size == chunks
    stages = [[kind.name for kind in layout.layout[s % pp_size][s // pp_size]] for s in range(len(layers))]
    assert [stage.count("decoder") for stage in stages] == layers
    assert stages[-1].count("mtp") == mtp_layers


@settings(deadline=None)
@given(uneven())
def test_no_stage_could_give_a_layer_to_another_and_make_the_longest_shorter(case):
    layers = layers_of_stages(*case)
    loads = [count + other for count, other in zip(layers, other_layers(len(layers), case[3]))]
    movable = [load for load, count in zip(loads, layers) if count > 1]
    assert not movable or max(movable) - min(loads) <= 1


@settings(deadline=None)
@given(uneven())
def test_longer_stages_share_chunks(case):
    num_layers, pp_size, chunks, _ = case
    layers = layers_of_stages(num_layers, pp_size, chunks)
    loads = [count + other for count, other in zip(layers, other_layers(len(layers), 0))]
    longest = [max(loads[first : first + pp_size]) for first in range(0, len(loads), pp_size)]
    # Rounded up for each chunk, no sum of longest stages is smaller; 1 more where first and last stage are fixed at 2.
    assert sum(longest) <= -(-sum(loads) // pp_size) + 1


@pytest.mark.parametrize(
    "num_layers, pp_size, chunks, mtp_layers, layout",
    [
        (62, 4, 4, 0, "Et*3|(t*4|)*14t*3L"),
        (61, 4, 4, 0, "Et*3|(t*4|)*14t*2L"),
        (62, 4, 4, 1, "Et*4|(t*4|)*14t*2mL"),
        (10, 2, 4, 0, "Et|t*2|(t|)*4t*2|tL"),
        (8, 4, 2, 2, "Et|(t|)*6tm*2L"),
    ],
)
def test_layouts(num_layers, pp_size, chunks, mtp_layers, layout):
    assert layout_of(layers_of_stages(num_layers, pp_size, chunks, mtp_layers), mtp_layers) == layout


def test_fewer_layers_than_stages_have_no_layout():
    with pytest.raises(ValueError, match="7 layers for 8 stages"):
        layers_of_stages(7, 4, 2)
