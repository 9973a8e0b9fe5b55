"""Orders and plans of a step, their proof and their prediction. Usable without torch and without Megatron."""

from .check import check
from .ir import Action, Op, PipelineShape, Schedule
from .lower import lower
from .orders import breadth_first, forward_only, interleaved_1f1b, one_f_one_b
from .simulate import ScheduleError, Span, Timeline, simulate

__all__ = [
    "Action",
    "Op",
    "PipelineShape",
    "Schedule",
    "ScheduleError",
    "Span",
    "Timeline",
    "breadth_first",
    "check",
    "forward_only",
    "interleaved_1f1b",
    "lower",
    "one_f_one_b",
    "simulate",
]
