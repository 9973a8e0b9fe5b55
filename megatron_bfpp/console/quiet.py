"""Silence for what torch and Megatron always print on a machine without GPUs and their libraries."""

import logging
import warnings

__all__ = ["silence_imports"]

_OF_MEGATRON = (
    r"(?s).*\b(is|are) not installed\b",  # Transformer Engine, Apex, absl.logging
    r"Only transformer-engine",  # the version of one that is not installed
    r"full scope is deprecated",  # of CUDA graphs, which its own default asks for
)


def silence_imports() -> None:
    """Ignore the known warnings in this process and those forked from it. Call it before the import.

    PYTHONWARNINGS is read as an interpreter starts: setting it in a running one changes nothing there.
    """
    for message in _OF_MEGATRON:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    # Megatron calls collectives by the names that torch before 2.14 has.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # Where CUDA is installed without a GPU, torch logs that it found no CUDA runtime.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
