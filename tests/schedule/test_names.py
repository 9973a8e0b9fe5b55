"""The table of schedules: words and colours that tell them apart, flags that choose them, orders that are sound."""

import argparse
from itertools import combinations

import pytest

from megatron_bfpp.schedule import PipelineShape, check, lower
from megatron_bfpp.schedule.names import ORDERS, SCHEDULES, order_of, waits_of, word_of
from megatron_bfpp.schedule.orders import breadth_first, split_backward, weight_lags

GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"


def test_a_schedule_stands_under_its_own_word():
    assert all(word == each.word for word, each in SCHEDULES.items())
    assert set(ORDERS) <= SCHEDULES.keys()
    assert len({each.about for each in SCHEDULES.values()}) == len(SCHEDULES)


def luminance(color):
    """Return the relative luminance of WCAG 2, from 0 for black to 1 for white."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, two):
    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("paper", ["#ffffff", "#15181c"])
@pytest.mark.parametrize("word", SCHEDULES)
def test_a_colour_is_readable_on_light_and_on_dark_paper(word, paper):
    assert contrast(SCHEDULES[word].color, paper) >= 3


def test_no_two_schedules_have_colours_that_look_alike():
    for one, two in combinations(SCHEDULES.values(), 2):
        apart = sum(abs(int(one.color[at : at + 2], 16) - int(two.color[at : at + 2], 16)) for at in (1, 3, 5))
        assert apart >= 60, (one.word, two.word)


def parsed(words):
    """Parse flags with the plugin's parser, to which the five flags of Megatron in the table are added."""
    settings = pytest.importorskip("megatron_bfpp.integration.flags.settings", reason="needs torch")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    settings.add_flags(parser, "1f1b")
    parser.add_argument(GROUP, type=int)
    for switch in (
        "--use-torch-fsdp2",
        "--no-gradient-accumulation-fusion",
        "--overlap-p2p-communication-warmup-flush",
    ):
        parser.add_argument(switch, action="store_true")
    parser.add_argument("--ckpt-format", choices=["torch_dist"])
    args = parser.parse_args(words)
    return args, settings.settings_of(args)


@pytest.mark.parametrize("word", [word for word, each in SCHEDULES.items() if each.flags])
def test_the_flags_of_a_schedule_are_those_of_a_job_that_goes_by_its_word(word):
    size, microbatches = 4, 8
    args, settings = parsed(SCHEDULES[word].flags_for(microbatches))
    found = word_of(
        settings.schedule, size, 2 if SCHEDULES[word].chunks else 1, microbatches,
        args.microbatch_group_size_per_virtual_pipeline_stage or size, backward=settings.backward,
        engine=settings.engine, weight_gradients=settings.weight_gradients,
        is_sharded=args.use_torch_fsdp2,
    )  # fmt: skip
    assert found == word


def test_a_group_of_all_microbatches_is_the_default_where_it_is_one_per_rank():
    assert word_of("1f1b", 4, 2, 4, 4) == word_of("1f1b", 4, 2, 8, 4) == word_of("1f1b", 4, 2, 8) == "interleaved"
    assert word_of("1f1b", 4, 2, 8, 8) == "interleaved-grouped" and word_of("1f1b", 4, 1, 8, 8) == "1f1b"


def test_options_that_are_combined_are_all_said():
    assert word_of("breadth-first", 4, 2, 8, backward="late", is_sharded=True) == "breadth-first-late-sharded"
    options = {"backward": "late", "weight_gradients": "deferred", "is_sharded": True}
    assert word_of("breadth-first", 4, 2, 8, **options) == "breadth-first-late-deferred-sharded"
    assert word_of("breadth-first", 4, 2, 8, weight_gradients="with-backward") == "breadth-first"


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 8), (3, 4, 9)])
@pytest.mark.parametrize("word", [word for word, each in SCHEDULES.items() if each.order])
def test_the_order_of_every_word_is_sound(word, sizes):
    size, chunks, microbatches = sizes
    shape = PipelineShape(size, chunks if SCHEDULES[word].chunks else 1, microbatches)
    check(lower(order_of(word, shape), shape), shape)
    assert waits_of(word) is SCHEDULES[word].waits


def test_a_split_order_takes_its_weight_lag():
    shape = PipelineShape(4, 2, 8)
    split = split_backward(order_of("breadth-first", shape), [0, 1, 1, 1])
    assert order_of("breadth-first-deferred", shape, weight_lag=[0, 1, 1, 1]) == split
    assert order_of("breadth-first-deferred", shape) == breadth_first(shape, weight_lag=weight_lags(shape))


def test_torch_makes_the_orders_of_its_own_words():
    with pytest.raises(ValueError, match="the order of torch-looped-bfs is made by torch"):
        order_of("torch-looped-bfs", PipelineShape(2, 2, 2))
