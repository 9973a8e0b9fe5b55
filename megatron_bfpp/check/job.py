"""The job that a dry run asks about: its command line, the number of its GPUs, its pipeline ranks."""

import argparse
import os
import re
from typing import TYPE_CHECKING

from ..console.config_file import cluster, load
from ..console.errors import UserError
from ..planner.command import model_words, notes_of_file
from ..planner.flags import parse
from ..planner.flags.refused import OTHER_JOBS, refuse_other_models
from ..planner.flags.script import SCRIPTS
from ..planner.flags.strategy import rounded_batch
from .answers import Question

if TYPE_CHECKING:
    from ..planner.hardware import GPU

__all__ = ["MOST_GPUS", "fitting_batch", "pp_ranks_of", "question_of"]

MOST_GPUS = 10**6
GPUS_PER_NODE = 8  # where no kind of GPU is named
_BATCH = "--global-batch-size"


def question_of(args: argparse.Namespace, flags: list[str], gpu: "GPU | None") -> tuple[Question, str]:
    """Return what the ranks are asked, and where the world size comes from. flags: those behind the file's."""
    path, is_script = args.config, args.config is not None and args.config.endswith(SCRIPTS)
    environment = {} if path is None or is_script else load(path, expand=False)[0]
    environment = {name: _expanded(value) for name, value in environment.items()}
    words = flags if path is None else [*map(_expanded, model_words([path])), *flags]
    world_size, source = _world_size(args, environment)
    if not 1 <= world_size <= MOST_GPUS:
        raise UserError(f"the number of GPUs is {world_size} ({source}); it must lie between 1 and {MOST_GPUS}.")
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    refuse_other_models(given, words)
    notes = [] if path is None else notes_of_file(path)
    if args.fit_batch and (fitting := fitting_batch(words, flags, world_size)) is not None:
        words, note = [*words, _BATCH, str(fitting[0])], fitting[1]
        notes.append(note)
    per_node = GPUS_PER_NODE if gpu is None else gpu.gpus_per_node
    capability = None if gpu is None else int(gpu.compute_capability)  # which Megatron's validation asks for
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    passes_over = "what Megatron does not know, as flags of the launcher" if is_script else ""
    for job in (OTHER_JOBS[flag] for flag in given if flag in OTHER_JOBS):
        passes_over = f"flags of {job}, which this job does: a training step of its model is checked instead"
    question = Question(words, environment, world_size, per_node, capability, passes_over, notes)
    return question, source


def fitting_batch(words: list[str], flags: list[str], world_size: int) -> tuple[int, str] | None:
    """Return the batch that so many GPUs need in place of the file's, as `bfpp plan` raises it, and a line about it.

    None where the file's is right, where `flags`, behind the file's, give one, and where the estimate does not know
    the job: then Megatron's own word on it counts.
    """
    if any(word.partition("=")[0] == _BATCH for word in flags):
        return None
    try:
        parsed = parse(words)
        known, given = len(parsed.notes), parsed.global_batch_size
        batch = rounded_batch(parsed, world_size)
    except UserError:
        return None
    return None if given is None or batch == given else (batch, parsed.notes[known])


def _expanded(text: str) -> str:
    """Replace ${VAR} as far as it is set: the variables that name data files need not be."""
    return re.sub(r"\$\{(\w+)\}", lambda match: os.environ.get(match[1], match[0]), text)


def _world_size(args: argparse.Namespace, environment: dict[str, str]) -> tuple[int, str]:
    if args.gpus is not None:
        return args.gpus, "--gpus"
    for variables, source in ((environment, f"WORLD_SIZE of {args.config}"), (os.environ, "WORLD_SIZE")):
        if "WORLD_SIZE" in variables:
            if not variables["WORLD_SIZE"].isdigit():
                raise UserError(f"{source} is {variables['WORLD_SIZE']!r}; it must be a number.")
            return int(variables["WORLD_SIZE"]), source
    has_cluster = args.config is not None and not args.config.endswith(SCRIPTS)
    if has_cluster and (gpus := cluster(args.config).gpus) is not None:
        return gpus, f"the cluster of {args.config}"
    raise UserError(
        "the number of GPUs is not known.\n"
        "  Add --gpus N, the world size of the job, or `cluster: {gpus: N}` to its file."
    )


def pp_ranks_of(text: str | None, words: list[str]) -> list[int]:
    """Return the pipeline ranks that --rank names; all of them without it."""
    pp_size = _pp_size(words)
    if text is None:
        return list(range(pp_size))
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) < pp_size for part in parts):
        raise UserError(
            f"--rank {text}: the pipeline ranks are 0 to {pp_size - 1}.\n  Write it as 0 or 0,{pp_size - 1}."
        )
    return sorted(set(map(int, parts)))


def _pp_size(words: list[str]) -> int:
    """Read the last --pipeline-model-parallel-size; 1 without the flag, or where Megatron will refuse its value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pipeline-model-parallel-size", dest="pp", nargs="?", default="1")
    found = parser.parse_known_args(words)[0].pp or ""
    return int(found) if found.isascii() and found.isdigit() and 0 < int(found) <= 10**4 else 1
