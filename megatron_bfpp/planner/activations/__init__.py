"""Bytes that a forward leaves for its backward."""

from .rank import Activations

__all__ = ["Activations"]
