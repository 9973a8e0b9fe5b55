"""Place a hybrid model: cut its pattern of layers into the stages of the pipeline, by what the layers cost.

Megatron's pattern has a letter for each layer, and | where one stage ends and the next begins; stage = chunk * pp_size
+ pp_rank as everywhere. MTP layers follow after /, and stand with the output layer on the last stage.
"""

from itertools import accumulate, islice, pairwise
from typing import Any

from ...console.errors import UserError
from .chunks import (
    BUBBLE_GOAL,
    CHUNKS,
    LAYERS,
    LAYOUT,
    MOST_CHUNKS,
    NEEDS_2,
    SHARES,
    fewest_that_suffice,
    given,
    idle_part,
    name_of,
)  # fmt: skip
from .layers import LAYER_KINDS, layer_flops
from .partition import cuts
from .vocabulary import words_of

PATTERN = "--hybrid-layer-pattern"
_NAMES = (PATTERN, "--hybrid-override-pattern")  # the second is the first one's older name


def is_hybrid(args: Any) -> bool:
    """Return whether the model has a pattern of layers, which then places them."""
    return bool(given(args, _NAMES))


def flag_of(args: Any) -> str:
    """Return the flag of the pattern."""
    flags = given(args, _NAMES)
    if len(flags) > 1:
        raise UserError(f"{' and '.join(flags)} both name the layers.\n  Leave out {flags[1]}, the older name.")
    return flags[0]


def letters_of(args: Any) -> str:
    """Return the letters of a hybrid model's layers, those of MTP too, with any |; "" for a GPT.

    args: before or after Megatron validates them, which leaves a pattern under both names.
    """
    flags = given(args, _NAMES)
    if not flags:
        return ""
    pattern, mtp = parts_of(args, flags[0])
    return pattern + "".join(mtp)


def place_pattern(args: Any, microbatches: int) -> list[str]:
    """Cut a pattern without | and return a line about it; check one with |. UserError if it cannot be placed.

    args: Megatron's, before it validates them. microbatches: of a step; of the longest where they grow.
    """
    flag = flag_of(args)
    pattern, mtp = parts_of(args, flag)
    _refuse_others(args, flag, pattern)
    if "|" in pattern:
        _check_segments(flag, pattern, args.pipeline_model_parallel_size)
        return []
    costs, told = costs_of(args, flag, pattern, mtp)
    stages, chosen = _stages(args, microbatches, flag, costs)
    instead = "" if chosen else f" in place of {CHUNKS} {args.num_virtual_stages_per_pipeline_rank}"
    name, pp_size = name_of(flag), args.pipeline_model_parallel_size
    written = getattr(args, name)
    setattr(args, name, segments_of(pattern, stages) + written[len(pattern) :])
    args.num_virtual_stages_per_pipeline_rank = None  # Megatron counts the segments
    idle_of_step = idle_part(pp_size, microbatches, _loads(costs, stages))
    idle = f"{idle_of_step:.1%} of the step with {microbatches} micro-batches"
    how = f"{pp_size} x {len(stages) // pp_size} stages by the layers' operations ({told})"
    return [f"set {flag} '{getattr(args, name)}'{instead}: {how}; ranks are predicted to be idle {idle}{chosen}"]


def segments_of(pattern: str, stages: list[int]) -> str:
    """Return a pattern with | where a stage ends. stages: the layers of each."""
    return "|".join(pattern[begin:end] for begin, end in pairwise([0, *accumulate(stages)]))


def parts_of(args: Any, flag: str) -> tuple[str, list[str]]:
    """Return the pattern before any MTP layers, and the patterns of those."""
    text = getattr(args, name_of(flag))
    pattern, *mtp = text.split("/")
    older = getattr(args, "mtp_hybrid_override_pattern", None)
    if older and "/" not in text:
        mtp = [older] * (getattr(args, "mtp_num_layers", None) or 0)
    return pattern, mtp


def _loads(costs: list[int], stages: list[int]) -> list[float]:
    return [float(sum(costs[begin:end])) for begin, end in pairwise([0, *accumulate(stages)])]


def _refuse_others(args: Any, flag: str, pattern: str) -> None:
    """Refuse the flags that place the layers of a GPT: Megatron takes none of them with chunks of a pattern."""
    others = given(args, (LAYERS, LAYOUT, *SHARES))
    if others:
        instead = "Leave it out: the plugin cuts the pattern; or put | into the pattern, which then says it"
        raise UserError(f"{others[0]} does not say where the layers of {flag} go.\n  {instead}.")
    chunks = args.num_virtual_stages_per_pipeline_rank
    if chunks is not None and "|" in pattern:
        both = f"{CHUNKS} {chunks} and the | of {flag} both say how the layers are split into chunks"
        raise UserError(f"{both}.\n  Leave out {CHUNKS}: Megatron counts the segments; or leave out the |.")
    if chunks is not None and chunks < 2:
        raise UserError(f"{NEEDS_2}, but {CHUNKS} is {chunks}.\n  Use 2 or more, or leave it out: the plugin chooses.")


def _check_segments(flag: str, pattern: str, pp_size: int) -> None:
    count = pattern.count("|") + 1
    if count % pp_size or count < 2 * pp_size:
        has = f"{flag} has {count} segments for {pp_size} pipeline ranks"
        raise UserError(
            f"{NEEDS_2}, and as many on each, but {has}.\n"
            f"  Use {2 * pp_size} or {3 * pp_size} segments, or leave out the |: the plugin then cuts the pattern."
        )


def costs_of(args: Any, flag: str, pattern: str, mtp: list[str]) -> tuple[list[int], str]:
    """Return the operations of a token in every layer, and in words what the layers cost.

    Forward and backward, and full recomputation. MTP and output layers are counted with the last layer, with which
    they share a stage; MTP has an output layer and a product of 2 h x h each time. The embedding has no operations.
    """
    unknown = sorted(set(pattern + "".join(mtp)) - set(LAYER_KINDS))
    if unknown:
        instead = "Put | into the pattern yourself, where a stage ends"
        raise UserError(f"{flag} has layers '{''.join(unknown)}', whose cost the plugin does not know.\n  {instead}.")
    missing = [each for each in ("--hidden-size", "--seq-length") if not getattr(args, name_of(each), None)]
    if missing:
        wrong = f"{' and '.join(missing)} of {flag} are not on the command line: the cost of its layers is not known"
        raise UserError(f"{wrong}.\n  Add them, or put | into the pattern.")
    passes = 4 if getattr(args, "recompute_granularity", None) == "full" else 3
    each = {kind: passes * round(sum(layer_flops(args, kind))) for kind in {*pattern, *"".join(mtp)}}
    words, whose = getattr(args, "padded_vocab_size", None) or getattr(args, "vocab_size", None), ""
    if not words:
        files = (getattr(args, name, None) for name in ("tokenizer_model", "vocab_file"))
        words, whose = words_of(getattr(args, "tokenizer_type", None), *files)
    last = 3 * 2 * args.hidden_size * words * (1 + len(mtp))
    last += sum(each[kind] for kind in "".join(mtp)) + len(mtp) * 3 * 4 * args.hidden_size**2
    costs = [each[kind] for kind in pattern]
    total = sum(costs) + last
    told = ", ".join(f"{kind} {each[kind] / total:.2%}" for kind in dict.fromkeys(pattern))
    told += f", {'MTP and ' if mtp else ''}output {last / total:.2%} of the model's"
    told += f" with {words} words, {whose}" if whose else ""
    if costs:
        costs[-1] += last
    return costs, told


def _stages(args: Any, microbatches: int, flag: str, costs: list[int]) -> tuple[list[int], str]:
    """Return the number of layers of every stage, and why so many stages, empty if the user has said it."""
    pp_size, chunks = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    fewest = chunks or 2
    if len(costs) < pp_size * fewest:
        ways = [f"{pp_size * fewest} layers or more"]
        if len(costs) // fewest >= 2:
            ways.append(f"--pipeline-model-parallel-size {len(costs) // fewest} or less")
        if fewest > 2 and len(costs) >= 2 * pp_size:
            ways.append(f"{CHUNKS} {len(costs) // pp_size} or less")
        needs = f"needs a layer in each of {pp_size} x {fewest} stages, but {flag} has {len(costs)}"
        raise UserError(f"--pipeline-schedule breadth-first {needs}.\n  Use {', or '.join(ways)}.")
    choices = dict(enumerate(islice(cuts(costs, pp_size), chunks or MOST_CHUNKS), start=1))
    if chunks:
        return choices[chunks], ""

    def loads_of(chunks: int) -> list[float]:
        return _loads(costs, choices[chunks])

    best = fewest_that_suffice(pp_size, microbatches, max(choices), loads_of)
    is_met = idle_part(pp_size, microbatches, loads_of(best)) < BUBBLE_GOAL
    goal = "the fewest chunks below" if is_met else "the least there is; goal:"
    return choices[best], f", {goal} {BUBBLE_GOAL:.0%}"
