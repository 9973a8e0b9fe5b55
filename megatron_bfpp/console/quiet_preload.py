"""Imported for its effect by servers that fork, before torch and Megatron: multiprocessing calls no function there."""

from .quiet import silence_imports

silence_imports()
