"""bfpp check FILE: proves a plan complete, in an order that its dependencies allow, and free of deadlock."""

from ..schedule import Op, ScheduleError, check, formats
from ..schedule.formats import read, shape_of, title

__all__ = ["check_plan"]


def check_plan(path: str, pp: int | None, chunks: int | None, microbatches: int | None) -> int:
    """Print whether the plan is sound and return 0 if it is, else 1. None: the shape that the file's numbers give."""
    plan = read(path)
    shape = shape_of(plan, pp, chunks, microbatches, path)
    try:
        check(plan, shape, forward_only=not any(action.op is Op.B for rank in plan for action in rank))
    except ScheduleError as error:
        print(f"unsound as {title(shape)}: {error}")
        return 1
    print(f"sound: {title(shape)}, {sum(map(len, plan))} actions, plan {formats.digest(plan)}")
    return 0
