"""Every shape and group has a proven plan and the predicted memory. Each run goes through a part of them.

BFPP_ALL_CASES=1 goes through the whole product and the large shapes, on all cores.
"""

import multiprocessing
import os
import random
from itertools import product

import pytest

from megatron_bfpp.schedule import (
    PipelineShape,
    ScheduleError,
    breadth_first,
    check,
    forward_only,
    interleaved_1f1b,
    lower,
    simulate,
)
from megatron_bfpp.schedule.orders import weight_lags

ORDERS = {
    "eager": lambda shape, group: breadth_first(shape, group, eager_backward=True),
    "late": lambda shape, group: breadth_first(shape, group, eager_backward=False),
    "evaluation": lambda shape, group: forward_only(shape),
    "1f1b": interleaved_1f1b,
}


def every_case():
    for sizes in product(range(2, 9), range(1, 5), range(1, 25)):
        size, _, microbatches = sizes
        yield sizes, "evaluation", None
        for group in range(1, microbatches + 1):
            yield sizes, "eager", group
            yield sizes, "late", group
            if group >= size and (microbatches % group == 0 or microbatches % group >= size):
                yield sizes, "1f1b", group


ALL_CASES = list(every_case())
# 61 divides none of the sizes, so the part meets all of them.
CASES = ALL_CASES if os.environ.get("BFPP_ALL_CASES") else ALL_CASES[::61]
LARGE = [((64, 8, 512), "eager", None), ((64, 8, 512), "late", None), ((64, 8, 512), "eager", 128),
         ((64, 8, 512), "late", 128), ((64, 8, 512), "evaluation", None), ((64, 8, 512), "1f1b", 64)]  # fmt: skip


def complaint(case):
    """Return what is wrong with the plan of a case, or None."""
    sizes, kind, group = case
    shape = PipelineShape(*sizes)
    order = ORDERS[kind](shape, group)
    try:
        check(lower(order, shape), shape, forward_only=kind == "evaluation")
        resident = 1 + sum(sizes) % shape.num_chunks
        check(lower(order, shape, resident_chunks=resident), shape, kind == "evaluation", resident)
    except ScheduleError as error:
        return f"{case}: {error}"
    if kind in ("eager", "late"):
        found, wanted = simulate(order, shape).peak_live_activations(), peaks(*sizes, group, kind)
        if found != wanted:
            return f"{case}: peaks {found}, but the formula says {wanted}"
    return None


def peaks(size, chunks, microbatches, group, kind):
    """Work out the formula of breadth_first's docstring, with the sizes of groups found in another way."""
    group = microbatches if group is None else group
    count = next(n for n in range(1, microbatches + 1) if n * group >= microbatches)  # groups of at most `group`,
    if microbatches // count < min(group, size):  # or fewer and longer ones, where one could not fill the pipeline
        count = max(n for n in range(1, microbatches + 1) if n * group <= microbatches)
    shortest, longest = microbatches // count, -(-microbatches // count)
    ahead = (chunks - 1 if kind == "eager" else chunks) * longest
    return [min(microbatches * chunks, ahead + 2 * min(size - rank - 1, shortest) + 1) for rank in range(size)]


# How many micro-batches await their W on each rank of a split order.
LAGS = {
    "by the formula": lambda shape, rng: weight_lags(shape),
    "none": lambda shape, rng: [0] * shape.pp_size,
    "all": lambda shape, rng: [shape.num_microbatches * shape.num_chunks] * shape.pp_size,
    "random": lambda shape, rng: [rng.randint(0, rng.choice((2, 8, 96))) for _ in range(shape.pp_size)],
}
ALL_SPLIT = list(product(product(range(2, 9), range(1, 5), range(1, 25)), ("eager", "late"), LAGS))
SPLIT = ALL_SPLIT if os.environ.get("BFPP_ALL_CASES") else ALL_SPLIT[::61]


def complaint_of_split(case):
    """Return what is wrong with the plans of a case with split backwards, or None."""
    sizes, kind, lags = case
    shape, rng = PipelineShape(*sizes), random.Random(str(case))
    group = rng.randint(1, shape.num_microbatches) if lags == "random" and rng.random() < 0.5 else None
    owed = LAGS[lags](shape, rng)
    order = breadth_first(shape, group, kind == "eager", owed)
    try:
        for hop in (0.25, 1.0, None):
            check(lower(order, shape, hop=hop), shape)
        resident = rng.randint(1, shape.num_chunks)
        check(lower(order, shape, resident_chunks=resident), shape, False, resident)
    except ScheduleError as error:
        return f"{case}, group {group}, lags {owed}: {error}"
    if lags == "by the formula":
        found, wanted = max(simulate(order, shape).peak_live_activations()), max(peaks(*sizes, None, kind))
        if found != wanted:
            return f"{case}: a peak of {found}, but that of the plain order is {wanted}"
    return None


def complaints_of(function, cases, total):
    """Return what `function` complains of; the whole product on all cores."""
    if len(cases) < total:
        return list(map(function, cases))
    with multiprocessing.get_context("spawn").Pool() as pool:
        return list(pool.imap_unordered(function, cases, chunksize=32))


@pytest.mark.slow
def test_every_plan_is_proved_and_its_peaks_are_those_of_the_formula():
    assert {kind for _, kind, _ in CASES} == ORDERS.keys()
    assert {sizes[:2] for sizes, _, _ in CASES} == set(product(range(2, 9), range(1, 5)))
    complaints = complaints_of(complaint, CASES, len(ALL_CASES))
    assert len(complaints) == len(CASES) and not any(complaints), "\n".join(filter(None, complaints))


@pytest.mark.slow
def test_every_plan_with_split_backwards_is_proved_with_any_lags():
    assert {case[1:] for case in SPLIT} == set(product(("eager", "late"), LAGS))
    assert {sizes[:2] for sizes, _, _ in SPLIT} == set(product(range(2, 9), range(1, 5)))
    complaints = complaints_of(complaint_of_split, SPLIT, len(ALL_SPLIT))
    assert len(complaints) == len(SPLIT) and not any(complaints), "\n".join(filter(None, complaints))


@pytest.mark.skipif(not os.environ.get("BFPP_ALL_CASES"), reason="1.6 million actions each; with BFPP_ALL_CASES=1")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_shapes_are_proved(case):
    assert complaint(case) is None
