"""The processes of a dry run: one per pipeline rank, as many at a time as there are cores."""

import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..console.errors import require
from ..console.forked import Forks
from ..console.progress import Steps

if TYPE_CHECKING:
    from .answers import Question, Rank

_PRELOAD = ("megatron.training.training", "megatron_bfpp.integration.step.forward_backward",
            "megatron_bfpp.integration.gpt.script", "megatron_bfpp.check.rank")  # fmt: skip


def examine_ranks(question: "Question", pp_ranks: list[int]) -> "list[Rank]":
    """Return the answers in the order of `pp_ranks`, the first with the plans.

    Raises UserError with the message of the first rank that is refused, or where one is killed.
    """
    require("megatron", "a job's configuration")
    found: dict[int, Rank] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with Forks(*_PRELOAD, at_most=cores) as forks, Steps(len(pp_ranks), "starting Megatron") as bar:
        for pp_rank in pp_ranks:
            forks.start(f"pp_rank {pp_rank}", _rank, question, pp_rank, pp_rank == pp_ranks[0])
        while (answer := forks.next()) is not None:
            rank: Rank = answer[1]
            found[rank.pp_rank] = rank
            bar.step(f"pp_rank {rank.pp_rank} is built")
    return [found[pp_rank] for pp_rank in pp_ranks]


def _rank(question: "Question", pp_rank: int, with_plans: bool) -> "Iterator[Rank]":
    from .rank import examine

    with tempfile.TemporaryFile() as log:  # Megatron lists its arguments and its groups; only the answer counts
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield examine(question, pp_rank, with_plans)
