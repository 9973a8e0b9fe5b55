"""Formats the reports of all ranks at the end of a job, for the first rank's log."""

from collections import Counter

from .activity import Status

MOST_LINES = 64  # of a job with thousands of ranks


def summary(why: str, said: dict[int, Status], world_size: int) -> str:
    """Return the text. why: the first alarm. said: the reports by rank; missing ranks have sent none."""
    silent = [rank for rank in range(world_size) if rank not in said]
    lines = [f"megatron_bfpp: all {world_size} ranks, as far as they speak; the job ends: {why}"]
    lines += [f"  rank {rank} says nothing: it is dead, stopped or cut off" for rank in silent[:MOST_LINES]]
    # Ranks that wait for no other rank stand first: one of them is the cause.
    ordered = sorted(said.values(), key=lambda each: (each.waiting is not None, not each.ended, each.rank))
    shown = ordered[: max(0, MOST_LINES - len(silent))]
    lines += [f"  {each}" + (f"; {each.ended}" if each.ended else "") for each in shown]
    left = len(silent[MOST_LINES:]) + len(ordered) - len(shown)
    if left:
        lines.append(f"  and {left} more; waiting for: {_most_waited_for(ordered)}")
    return "\n".join(lines)


def _most_waited_for(statuses: list[Status]) -> str:
    counts = Counter(each.peer_rank for each in statuses if each.peer_rank is not None)
    return ", ".join(f"rank {rank} ({count} ranks)" for rank, count in counts.most_common(5)) or "no other rank"
