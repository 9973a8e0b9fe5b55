"""The time of a step: exact from its plan, or from a formula."""

from .formula import REPLAY_LIMIT, Step, formula_step, replay_step

__all__ = ["REPLAY_LIMIT", "Step", "formula_step", "replay_step"]
