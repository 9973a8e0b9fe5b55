"""The checker rejects exactly those random mutations of sound plans, of every order, that change what is computed.

The oracle (oracle.py) decides that: it runs a plan on symbols and shares no code with the checker.
BFPP_ALL_CASES=1 runs 10,000 mutations, the default 1500. One case again: python tests/schedule/test_mutations.py SEED
"""

import os
import random
import sys
from collections import Counter
from functools import cache
from itertools import combinations

import pytest
from oracle import meaning

from megatron_bfpp.schedule import Op, PipelineShape, ScheduleError, check, formats, lower
from megatron_bfpp.schedule.ir import CHUNK_OPS, RECEIVES
from megatron_bfpp.schedule.orders import breadth_first, forward_only, interleaved_1f1b, one_f_one_b

CASES = 10_000 if os.environ.get("BFPP_ALL_CASES") == "1" else 1500
ORDERS = (
    "1f1b",
    "interleaved",
    "interleaved, grouped",
    "eager",
    "late",
    "eager, grouped",
    "late, grouped",
    "evaluation",
)

# Complaints of the checker, one per rule, that random mutations must meet.
REASONS = (
    "are missing", "does not belong to this rank", "and again at step", " comes before ", "no rank can run",
    "are crossed", "parameters are sharded", "gathers what is gathered", "gives up what is not gathered",
    "more than the", "at the end of the step",
)  # fmt: skip


@cache
def sound_plan(name, sizes, group, resident):
    """Return a plan and what it computes, with its reductions and gathers and as a job without data parallelism."""
    shape = PipelineShape(*sizes)
    if name == "1f1b":
        order = one_f_one_b(shape)
    elif name.startswith("interleaved"):
        order = interleaved_1f1b(shape, group)
    elif name == "evaluation":
        order = forward_only(shape)
    else:
        order = breadth_first(shape, group, name.startswith("eager"))
    plan = lower(order, shape, resident_chunks=resident)
    check(plan, shape, name == "evaluation", resident)
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
    elif name.endswith("grouped"):
        group = rng.randint(1, microbatches)
    resident = rng.randint(1, chunks) if rng.random() < 0.4 else None
    sizes = size, chunks, microbatches
    return name, PipelineShape(*sizes), resident, *sound_plan(name, sizes, group, resident)


# Mutations: each changes the lists in place


def place(rng, actions):
    """Choose the place of an action; gathers, reductions and frees more often than their share."""
    chunk_ops = [at for at, action in enumerate(actions) if action.op in CHUNK_OPS]
    return rng.choice(chunk_ops) if chunk_ops and rng.random() < 0.3 else rng.randrange(len(actions))


def drop(rng, plan, shape):
    actions = rng.choice(plan)
    del actions[place(rng, actions)]


def double(rng, plan, shape):
    actions = rng.choice(plan)
    actions.insert(rng.randrange(len(actions) + 1), actions[place(rng, actions)])


def swap(rng, plan, shape):
    actions = rng.choice(plan)
    one, two = rng.randrange(len(actions)), rng.randrange(len(actions))
    actions[one], actions[two] = actions[two], actions[one]


def swap_neighbours(rng, plan, shape):
    actions = rng.choice(plan)
    at = rng.randrange(len(actions) - 1)
    actions[at : at + 2] = actions[at + 1], actions[at]


def move(rng, plan, shape):
    actions = rng.choice(plan)
    action = actions.pop(place(rng, actions))
    actions.insert(rng.randrange(len(actions) + 1), action)


def move_a_little(rng, plan, shape):
    actions = rng.choice(plan)
    at = place(rng, actions)
    action = actions.pop(at)
    actions.insert(max(0, at + rng.randint(-4, 4)), action)


def exchange_ranks(rng, plan, shape):
    one, two = rng.sample(range(shape.pp_size), 2)
    plan[one], plan[two] = plan[two], plan[one]


def exchange_between_ranks(rng, plan, shape):
    """Two actions of two ranks."""
    one, two = rng.sample(plan, 2)
    i, j = rng.randrange(len(one)), rng.randrange(len(two))
    one[i], two[j] = two[j], one[i]


def give_away(rng, plan, shape):
    """Move an action to another rank."""
    one, two = rng.sample(plan, 2)
    two.insert(rng.randrange(len(two) + 1), one.pop(rng.randrange(len(one))))


def other_microbatch(rng, plan, shape):
    actions = rng.choice(plan)
    at = rng.choice([at for at, action in enumerate(actions) if action.op not in CHUNK_OPS])
    actions[at] = actions[at]._replace(microbatch=rng.randint(0, shape.num_microbatches))


def other_stage(rng, plan, shape):
    """Another chunk of the rank, or, with another rank's stage, another peer."""
    actions = rng.choice(plan)
    at = place(rng, actions)
    step = rng.choice((-shape.pp_size, shape.pp_size, -1, 1))
    actions[at] = actions[at]._replace(stage=max(0, actions[at].stage + step))


def other_kind(rng, plan, shape):
    actions = rng.choice(plan)
    at = rng.randrange(len(actions))
    op = rng.choice(list(Op))
    microbatch = None if op in CHUNK_OPS else actions[at].microbatch or 0
    actions[at] = actions[at]._replace(op=op, microbatch=microbatch)


def exchange_microbatches(rng, plan, shape):
    """Two micro-batches of one stage, in one kind of action or in all of one rank."""
    if shape.num_microbatches == 1:
        return
    actions = rng.choice(plan)
    stage, op, _ = rng.choice(actions)
    one, two = rng.sample(range(shape.num_microbatches), 2)
    names, everywhere = {one: two, two: one}, rng.random() < 0.3
    for at, action in enumerate(actions):
        if action.stage == stage and (everywhere or action.op is op) and action.microbatch in names:
            actions[at] = action._replace(microbatch=names[action.microbatch])


def reverse_a_stretch(rng, plan, shape):
    actions = rng.choice(plan)
    at = rng.randrange(len(actions))
    actions[at : at + 4] = actions[at : at + 4][::-1]


def late_receives(rng, plan, shape):
    """Some receives of a rank right before the action that needs them: sends wait for them, and may be due before."""
    actions, part = rng.choice(plan), rng.choice((0.1, 0.5, 1))
    for action in [each for each in actions if each.op in RECEIVES and rng.random() < part]:
        needing = action._replace(op=Op.F if action.op is Op.RECV_F else Op.B)
        if actions.count(needing) == 1:
            actions.remove(action)
            actions.insert(actions.index(needing), action)


MUTATIONS = (
    drop, double, swap, swap_neighbours, move, move_a_little, exchange_ranks, exchange_between_ranks, give_away,
    other_microbatch,
    other_stage, other_kind, exchange_microbatches, reverse_a_stretch, late_receives,
)  # fmt: skip


def run_case(seed):
    """(mutation, order, whether the checker accepts, whether it should, the plan and the verdict as text)."""
    rng = random.Random(seed)
    name, shape, resident, plan, wanted = sound(rng)
    plan = [list(actions) for actions in plan]
    mutation = rng.choice(MUTATIONS)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if all(len(actions) > 1 for actions in plan):
            mutation(rng, plan, shape)
    verdict = "accepted"
    try:
        # The oracle knows NCCL's rules; CUDA's have an oracle of their own, cuda_rules.py.
        check(plan, shape, name == "evaluation", resident, one_queue=False, device_waits=False)
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
    # Dropped or doubled: never the same. Moved: often.
    assert not accepted["drop"] and not accepted["double"], accepted
    assert all(
        accepted[name] > 0 for name in ("swap", "swap_neighbours", "move", "move_a_little", "reverse_a_stretch")
    ), accepted
    assert all(reasons[reason] > 0 for reason in REASONS), reasons
    assert all(orders[order, accepts] > 0 for order in ORDERS for accepts in (True, False)), orders


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:]):
        print(*run_case(seed), sep="\n")
