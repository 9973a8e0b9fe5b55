"""Mutations of plans: each changes the lists in place, in a way that may or may not change what the plan computes."""

from megatron_bfpp.schedule import Op
from megatron_bfpp.schedule.ir import CHUNK_OPS, RECEIVES


def place(rng, actions):
    """Choose the place of an action; gathers, reductions and frees more often than their share."""
    chunk_ops = [at for at, action in enumerate(actions) if action.op in CHUNK_OPS]
    return rng.choice(chunk_ops) if chunk_ops and rng.random() < 0.4 else rng.randrange(len(actions))


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
        kinds = (Op.F,) if action.op is Op.RECV_F else (Op.B, Op.I)
        needing = [each for each in actions if each in [action._replace(op=kind) for kind in kinds]]
        if len(needing) == 1:
            actions.remove(action)
            actions.insert(actions.index(needing[0]), action)


# Of split backwards; without effect where a rank has none of what they change.


def of_kind(rng, actions, *kinds):
    """Choose the place of an action of one of these kinds; None where there is none."""
    places = [at for at, action in enumerate(actions) if action.op in kinds]
    return rng.choice(places) if places else None


def drop_weights(rng, plan, shape):
    actions = rng.choice(plan)
    at = of_kind(rng, actions, Op.W)
    if at is not None:
        del actions[at]


def exchange_input_and_weights(rng, plan, shape):
    """An I and its W."""
    actions = rng.choice(plan)
    at = of_kind(rng, actions, Op.I)
    if at is not None and (weights := actions[at]._replace(op=Op.W)) in actions:
        other = actions.index(weights)
        actions[at], actions[other] = actions[other], actions[at]


def exchange_weights(rng, plan, shape):
    """Two W's of one rank: of one stage, or of two."""
    actions = rng.choice(plan)
    one, two = of_kind(rng, actions, Op.W), of_kind(rng, actions, Op.W)
    if one is not None:
        actions[one], actions[two] = actions[two], actions[one]


def exchange_first_inputs(rng, plan, shape):
    """The I's of a micro-batch and the next of stage 0: it sends no gradients, whose messages would be out of order."""
    actions, first = plan[0], rng.randrange(shape.num_microbatches)
    pair = [at for at, each in enumerate(actions) if each[:2] == (0, Op.I) and each.microbatch in (first, first + 1)]
    if len(pair) == 2:
        one, two = pair
        actions[one], actions[two] = actions[two], actions[one]


def delay_weights(rng, plan, shape):
    """A W up to six places later, or to the end of its rank."""
    actions = rng.choice(plan)
    at = of_kind(rng, actions, Op.W)
    if at is not None:
        later = len(actions) if rng.random() < 0.2 else at + rng.randint(1, 6)
        actions.insert(later, actions[at])
        del actions[at]


def whole_or_split(rng, plan, shape):
    """B in place of an I and its W, or the other way round: for one micro-batch of a stage, or for all."""
    actions = rng.choice(plan)
    at = of_kind(rng, actions, Op.B, Op.I)
    if at is None:
        return
    stage, kind, chosen = actions[at]
    some = {chosen} if rng.random() < 0.6 else set(range(shape.num_microbatches))
    changed = []
    for action in actions:
        if action.stage != stage or action.microbatch not in some:
            changed.append(action)
        elif kind is Op.B and action.op is Op.B:
            changed += action._replace(op=Op.I), action._replace(op=Op.W)
        elif action.op is not Op.W:
            changed.append(action._replace(op=Op.B) if action.op is Op.I else action)
    actions[:] = changed


def reduce_early(rng, plan, shape):
    """A reduction up to four places before the last backward, I or W of its stage, or right behind one of the last."""
    actions = rng.choice(plan)
    at = of_kind(rng, actions, Op.REDUCE_GRAD)
    if at is not None:
        reduction = actions.pop(at)
        ends = [
            at for at, each in enumerate(actions) if each.stage == reduction.stage and each.op in (Op.B, Op.I, Op.W)
        ]
        if ends:
            actions.insert(max(0, rng.choice(ends[-3:]) - rng.randint(-1, 4)), reduction)


def free_early_or_never(rng, plan, shape):
    """A RESHARD before one of the last passes of its stage, or behind the last; or the last of the rank nowhere."""
    actions, is_freed = rng.choice(plan), rng.random() < 0.7
    places = [at for at, action in enumerate(actions) if action.op is Op.RESHARD]
    if places:
        free = actions.pop(rng.choice(places) if is_freed else places[-1])
        passes = [at for at, each in enumerate(actions) if each.stage == free.stage and each.op in (Op.F, Op.B, Op.I)]
        if passes and is_freed:
            actions.insert(rng.choice(passes[-2:]) + rng.randint(0, 1), free)


def move_send_of_input(rng, plan, shape):
    """A SEND_B up to three places earlier, or later behind W's and other actions."""
    actions = rng.choice(plan)
    at = of_kind(rng, actions, Op.SEND_B)
    if at is not None:
        send = actions.pop(at)
        actions.insert(max(0, at + rng.choice((-3, -2, -1, 1, 2, 3, 6))), send)


MUTATIONS = (
    drop, double, swap, swap_neighbours, move, move_a_little, exchange_ranks, exchange_between_ranks, give_away,
    other_microbatch, other_stage, other_kind, exchange_microbatches, reverse_a_stretch, late_receives,
)  # fmt: skip
OF_SPLIT_BACKWARDS = (
    drop_weights, exchange_input_and_weights, exchange_weights, exchange_first_inputs, delay_weights, whole_or_split,
    reduce_early, free_early_or_never, move_send_of_input,
)  # fmt: skip
