"""The checker rejects exactly those random mutations of sound plans, of every order, that change what is computed.

The oracle (oracle.py) decides that: it runs a plan on symbols and shares no code with the checker.
BFPP_ALL_CASES=1 runs 10,000 mutations, the default 2000. One case again, from the root of the repository:
PYTHONPATH=.:tests/support python tests/schedule/test_mutations.py SEED
"""

import os
import random
import sys
from collections import Counter
from functools import cache
from itertools import combinations

import pytest
from mutations import MUTATIONS, OF_SPLIT_BACKWARDS, drop
from oracle import meaning

from megatron_bfpp.schedule import Op, PipelineShape, ScheduleError, formats, lower, sharding
from megatron_bfpp.schedule import check as check_plan
from megatron_bfpp.schedule.ir import COMPUTE
from megatron_bfpp.schedule.orders import breadth_first, forward_only, interleaved_1f1b, one_f_one_b

check = sys.modules["megatron_bfpp.schedule.check"]  # the function hides the module's name

CASES = 10_000 if os.environ.get("BFPP_ALL_CASES") == "1" else 2000
ORDERS = (
    "1f1b",
    "interleaved",
    "interleaved, grouped",
    "eager",
    "late",
    "eager, grouped",
    "late, grouped",
    "eager, split",
    "late, split",
    "eager, grouped, split",
    "late, grouped, split",
    "evaluation",
)

OFTEN_THE_SAME = (
    "swap", "swap_neighbours", "move", "move_a_little", "reverse_a_stretch", "exchange_weights", "delay_weights",
    "whole_or_split", "move_send_of_input",
)  # fmt: skip

# Complaints of the checker, one per rule, that random mutations must meet.
REASONS = (
    "are missing", "does not belong to this rank", "and again at step", " comes before ", "no rank can run",
    "are crossed", "parameters are sharded", "gathers what is gathered", "gives up what is not gathered",
    "more than the", "at the end of the step", "is whole, but",
)  # fmt: skip


@cache
def sound_plan(name, sizes, group, resident, lags):
    """Return a plan and what it computes, with its reductions and gathers and as a job without data parallelism."""
    shape = PipelineShape(*sizes)
    if name == "1f1b":
        order = one_f_one_b(shape)
    elif name.startswith("interleaved"):
        order = interleaved_1f1b(shape, group)
    elif name == "evaluation":
        order = forward_only(shape)
    else:
        order = breadth_first(shape, group, name.startswith("eager"), lags)
    plan = lower(order, shape, resident_chunks=resident)
    check_plan(plan, shape, name == "evaluation", resident)
    # The checker cannot know whether there are replicas: it asks for a chunk op on all stages or on none.
    removable = (Op.REDUCE_GRAD,) if resident is not None else (Op.REDUCE_GRAD, Op.UNSHARD)
    subsets = [set(ops) for count in range(len(removable) + 1) for ops in combinations(removable, count)]
    plans = [[[action for action in actions if action.op not in ops] for actions in plan] for ops in subsets]
    wanted = [meaning(each, shape, resident=resident) for each in plans]
    assert not any(isinstance(each, str) for each in wanted), wanted
    return plan, wanted


def sound(rng):
    """(order, shape, resident chunks, plan, what it computes) of a random sound plan."""
    name = rng.choice(ORDERS)
    most = (8, 4, 12) if rng.random() < 0.1 else (5, 3, 6)
    size, chunks, microbatches, group = rng.randint(2, most[0]), rng.randint(1, most[1]), rng.randint(1, most[2]), None
    if name == "1f1b":
        chunks = 1
    elif name.startswith("interleaved"):
        size = rng.randint(2, 4)
        microbatches = size * rng.randint(1, 2)
        if name.endswith("grouped"):  # Megatron takes a last group that is empty or at least as long as the pipeline
            microbatches, group = 2 * size + rng.randint(0, 1), size + rng.randint(0, 1)
            group = group if microbatches % group in (0, *range(size, microbatches)) else microbatches
    elif "grouped" in name:
        group = rng.randint(1, microbatches)
    lags = tuple(rng.randint(0, rng.choice((1, 4, 20))) for _ in range(size)) if name.endswith("split") else None
    resident = rng.randint(1, chunks) if rng.random() < 0.5 else None
    sizes = size, chunks, microbatches
    return name, PipelineShape(*sizes), resident, *sound_plan(name, sizes, group, resident, lags)


def run_case(seed):
    """(mutation, order, whether the checker accepts, whether it should, the plan and the verdict as text)."""
    rng = random.Random(seed)
    name, shape, resident, plan, wanted = sound(rng)
    plan = [list(actions) for actions in plan]
    # Those of split backwards change whole ones too (`whole_or_split`, `reduce_early`), or nothing.
    is_split = name.endswith("split") and rng.random() < 0.5
    mutation = rng.choice(OF_SPLIT_BACKWARDS if is_split or rng.random() < 0.05 else MUTATIONS)
    # Dropped twice, the reductions of all stages may be gone: a sound plan again.
    for _ in range(1 if mutation is drop else rng.choice((1, 1, 1, 2, 3))):
        if all(len(actions) > 1 for actions in plan):
            mutation(rng, plan, shape)
    verdict = "accepted"
    try:
        # The oracle knows NCCL's rules; CUDA's have an oracle of their own, cuda_rules.py.
        check_plan(plan, shape, name == "evaluation", resident, one_queue=False, device_waits=False)
    except ScheduleError as error:
        verdict = str(error)
    found = meaning(plan, shape, resident=resident)
    hang = found if isinstance(found, str) else ""
    detail = f"{name}, {shape}, resident {resident}\n{verdict}\n{hang}\n{formats.to_text(plan)}"
    return mutation.__name__, name, verdict == "accepted", found in wanted, detail


@pytest.mark.slow
def test_the_checker_rejects_every_mutation_that_changes_the_meaning_and_no_other():
    accepted, rejected, orders, reasons = Counter(), Counter(), Counter(), Counter()
    for seed in range(CASES):
        mutation, order, accepts, is_same, detail = run_case(seed)
        assert accepts == is_same, f"seed {seed}: {mutation} of {detail}"
        (accepted if accepts else rejected)[mutation] += 1
        orders[order, accepts] += 1
        reasons.update(reason for reason in REASONS if reason in detail)
    print(f"{CASES} mutations: {rejected.total()} rejected, {accepted.total()} accepted, none wrongly")
    assert all(rejected[mutation.__name__] > CASES // 100 for mutation in MUTATIONS), rejected
    assert all(rejected[mutation.__name__] > CASES // 200 for mutation in OF_SPLIT_BACKWARDS), rejected
    # Dropped or doubled: never the same. Moved: often.
    assert not accepted["drop"] and not accepted["double"], accepted
    assert all(accepted[name] > 0 for name in OFTEN_THE_SAME), accepted
    assert all(reasons[reason] > 0 for reason in REASONS), reasons
    assert all(orders[order, accepts] > 0 for order in ORDERS for accepts in (True, False)), orders


def without(op, word):
    """A `_disorder` to which it is nothing that an `op` comes before or after a `word`."""
    complaints = check._disorder

    def weakened(steps, shape):
        return (each for each in complaints(steps, shape) if each[1].op is not op or word not in each[2])

    return weakened


def with_missing_weights(actions, *others):
    """A `_check_complete` to which a missing W is nothing: it reads the plan as if it stood right behind its I."""
    there = []
    for action in actions:
        weights = action._replace(op=Op.W)
        there += [action, weights] if action.op is Op.I and weights not in actions else [action]
    return check_complete(there, *others)


check_complete = check._check_complete
WEAKENED = {
    "a W may stand before its I": (check, "_disorder", without(Op.W, "I")),
    "the W's of a stage may stand in any order": (check, "_disorder", without(Op.W, "W")),
    "the I's of a stage may stand in any order": (check, "_disorder", without(Op.I, "I")),
    "a reduction may stand before the last W": (check, "_disorder", without(Op.REDUCE_GRAD, "W")),
    "a SEND_B may stand before its I": (check, "_disorder", without(Op.SEND_B, "I")),
    "a W may be missing": (check, "_check_complete", with_missing_weights),
    "an I needs no parameters": (sharding, "PASSES", frozenset({Op.F, Op.B})),
    "a W needs parameters": (sharding, "PASSES", COMPUTE),
}


@pytest.mark.parametrize("rule", WEAKENED)
def test_a_checker_with_another_rule_for_split_backwards_is_found_out(rule, monkeypatch):
    monkeypatch.setattr(*WEAKENED[rule])
    for seed in range(CASES):
        *_, accepts, is_same, _ = run_case(seed)
        if accepts != is_same:
            return
    pytest.fail(f"{CASES} mutations do not notice it")


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:]):
        print(*run_case(seed), sep="\n")
