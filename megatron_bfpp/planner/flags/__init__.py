"""Reads a model, and how it is to be run, from Megatron's flags."""

from .model import gpt_of, precision_of
from .strategy import strategy_of
from .words import parse

__all__ = ["gpt_of", "parse", "precision_of", "strategy_of"]
