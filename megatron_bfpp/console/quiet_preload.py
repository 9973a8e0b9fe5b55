"""Imported for its effect by servers that fork, before torch and Megatron: multiprocessing calls no function there."""

import signal

from .quiet import silence_imports

# Ctrl-C reaches every process of a terminal. The one that started the server ends those forked from it.
signal.signal(signal.SIGINT, signal.SIG_IGN)
silence_imports()
