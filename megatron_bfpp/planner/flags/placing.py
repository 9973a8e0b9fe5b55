"""Where the layers go: even, first and last stages of their own, counted ends, a layout, or a hybrid model's pattern.

As megatron.core.transformer.transformer_block.get_num_layers_to_build and pipeline_parallel_layer_layout have it. With
--pipeline-schedule breadth-first the plugin completes the flags before Megatron reads them, and here by the same rules.
"""

import argparse
import re
from copy import copy
from typing import NamedTuple

from ...console.errors import UserError
from ...schedule.model.chunks import CHUNKS, LAYOUT
from ...schedule.model.pattern import PATTERN, flag_of, is_hybrid, place_pattern
from ...schedule.model.placement import place_layers
from .model import hybrid

__all__ = ["Placing", "placing_of"]

_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_MOST = 100_000  # characters of a layout, written out


class Placing(NamedTuple):
    """How many decoder layers each stage has; () where they divide evenly."""

    chunks: int
    layers: tuple[int, ...] = ()
    mtp_stage: int = -1
    words: tuple[str, ...] = ()  # the flags that say so


def placing_of(args: argparse.Namespace, pp: int, microbatches: int) -> Placing:
    """Return the placement of the flags' layers. Raises UserError where they do not add up."""
    if pp > 1 and args.pipeline_schedule == "breadth-first":
        args = _completed(args, microbatches)
    pattern = hybrid(args)
    if args.pipeline_model_parallel_layout is not None and pp > 1:
        return _layout(args, pp)
    if pattern is not None and len(pattern.stages) > 1:
        if len(pattern.stages) % pp:
            raise UserError(f"{PATTERN} has {len(pattern.stages)} stages, no multiple of PP {pp}.\n"
                            "  Change the number of | in it, or --pipeline-model-parallel-size.")  # fmt: skip
        text = args.hybrid_layer_pattern or args.hybrid_override_pattern
        return Placing(len(pattern.stages) // pp, tuple(map(len, pattern.stages)), words=(flag_of(args), text))
    if pp == 1:
        return Placing(1)
    if pattern is not None and args.num_virtual_stages_per_pipeline_rank:
        raise UserError(f"{CHUNKS} does not go with {PATTERN} under Megatron's own schedule.\n"
                        "  Put | into the pattern where a stage ends; with --pipeline-schedule breadth-first the plugin"
                        " does.")  # fmt: skip
    return _counted(args, pp)


def _completed(args: argparse.Namespace, microbatches: int) -> argparse.Namespace:
    """Return the flags as the plugin completes them, with a line in the notes about what it chooses."""
    found = copy(args)
    lines = (place_pattern if is_hybrid(found) else place_layers)(found, microbatches)
    args.notes += [f"the plugin {line}" for line in lines]
    return found


def _counted(args: argparse.Namespace, pp: int) -> Placing:
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    embedding, loss = args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split
    total, words = args.num_layers + embedding + loss, []
    if first or last:
        if embedding or loss:
            raise UserError(f"{_FIRST if first else _LAST} and --account-for-... exclude each other.\n"
                            "  Leave out one of them.")  # fmt: skip
        rest, ranks = args.num_layers - (first or 0) - (last or 0), pp - bool(first) - bool(last)
        if rest < 0 or (rest % ranks if ranks else rest):
            raise UserError(f"--num-layers {args.num_layers} without {first or 0} on the first and {last or 0} on the"
                            f" last rank leaves {rest}, which {ranks} ranks cannot share evenly.\n"
                            f"  Change {_FIRST} or {_LAST}.")  # fmt: skip
        each = rest // ranks if ranks else 0
        of_ranks = [first or each, *[each] * (pp - 2), last or each]
        for flag, number in ((_FIRST, first), (_LAST, last)):
            words += [flag, str(number)] if number else []
    else:
        words += ["--account-for-embedding-in-pipeline-split"] * embedding
        words += ["--account-for-loss-in-pipeline-split"] * loss
        of_ranks = [total // pp] * pp
    chunks = args.num_virtual_stages_per_pipeline_rank or 1
    if args.num_layers_per_virtual_pipeline_stage:
        chunks = max(1, total // (pp * args.num_layers_per_virtual_pipeline_stage))
    if (not words and total % (pp * chunks)) or (
        words and (sum(of_ranks) != total or any(n % chunks for n in of_ranks))
    ):
        counted = f" + {embedding + loss} ends" if embedding or loss else ""
        raise UserError(f"--num-layers {args.num_layers}{counted} is no multiple of PP {pp} x {chunks} chunks.\n"
                        f"  Change one of them, or place the layers with {LAYOUT}.")  # fmt: skip
    if not words:
        return Placing(chunks)
    layers = [of_ranks[stage % pp] // chunks for stage in range(pp * chunks)]
    layers[0] -= embedding
    layers[-1] -= loss
    if chunks > 1:
        words += ["--num-virtual-stages-per-pipeline-rank", str(chunks)]
    return Placing(chunks, tuple(layers), -1, tuple(words))


def _layout(args: argparse.Namespace, pp: int) -> Placing:
    text = args.pipeline_model_parallel_layout
    stages = _written_out(text).split("|")
    if len(stages) % pp:
        raise UserError(f"{LAYOUT} {text} has {len(stages)} stages, no multiple of PP {pp}.\n"
                        "  Change the number of | in it, or --pipeline-model-parallel-size.")  # fmt: skip
    whole, mtp = "".join(stages), args.mtp_num_layers or 0
    if not whole.startswith("E") or not whole.endswith("L") or whole.count("E") + whole.count("L") != 2:
        raise UserError(f"{LAYOUT} {text} must begin with the one E (embedding) and end with the one L (loss).")
    for symbol, name, number, flag in (
        ("t", "layers", args.num_layers, "--num-layers"), ("m", "MTP layers", mtp, "--mtp-num-layers"),
    ):  # fmt: skip
        if whole.count(symbol) != number:
            raise UserError(f"{LAYOUT} {text} has {whole.count(symbol)} {name} ({symbol}), and {flag} is {number}.\n"
                            f"  Change one of them.")  # fmt: skip
    on = [number for number, stage in enumerate(stages) if "m" in stage]
    if len(on) > 1:
        raise UserError(f"{LAYOUT} {text} has MTP layers (m) on {len(on)} stages; Megatron wants them on one.")
    mtp_stage = on[0] if on else -1
    return Placing(len(stages) // pp, tuple(stage.count("t") for stage in stages), mtp_stage, (LAYOUT, text))


def _written_out(text: str) -> str:
    """Write a layout without its repetitions: Et*3|(tt|)*2L is Ettt|tt|tt|L."""
    plain = text.replace(",", "")
    for pattern in (r"([^()*\d])\*(\d{1,5})", r"\(([^()*]+)\)\*(\d{1,5})"):
        plain = re.sub(pattern, lambda match: match[1] * int(match[2]), _short(text, plain))
    if not re.fullmatch(r"[EtmL|]+", _short(text, plain)):
        raise UserError(f"{LAYOUT} {text} is not a layout; write it with E, t, m, L and |, such as Et*3|(tt|)*6mL.")
    return plain


def _short(text: str, plain: str) -> str:
    if len(plain) > _MOST:
        raise UserError(f"{LAYOUT} {text[:40]} has more than {_MOST:,} layers and stages.")
    return plain
