"""Drivers that make the calls of RL trainers in their order, with a tiny GPT on CPU ranks. Nothing of theirs is copied.

Each module names the trainer, the commit at which it was read, and the files. `tiny` has what they share.
"""
