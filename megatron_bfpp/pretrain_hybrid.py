"""The entry point for hybrid models without a Megatron-LM checkout; its flags are those of Megatron's own script.

    torchrun --nproc-per-node 8 -m megatron_bfpp.pretrain_hybrid [--device auto|cuda|cpu] \\
        --pipeline-schedule breadth-first --hybrid-layer-pattern PATTERN ARGS

Plain pretraining, as megatron_bfpp.pretrain_gpt does it for a GPT. Losses are bit-identical to Megatron's script.
"""

import sys
from functools import partial

from .integration.gpt.releases import train

__all__ = ["main"]

main = partial(train, hybrid=True)

if __name__ == "__main__":
    from .run import launch

    launch(sys.argv[1:], main)
