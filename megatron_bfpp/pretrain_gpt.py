"""The GPT entry point for people without a Megatron-LM checkout; its flags are those of Megatron's own script.

    torchrun --nproc-per-node 8 -m megatron_bfpp.pretrain_gpt [--device auto|cuda|cpu] \\
        --pipeline-schedule breadth-first ARGS

The megatron-core wheel holds the trainer and no script that starts it. This is plain GPT pretraining: dense or mixture
of experts, with or without multi-token prediction. For anything else start the script of a checkout, unmodified, with
megatron_bfpp.run. Losses are bit-identical to that script's.
"""

import sys

from .integration.gpt.releases import train as main

__all__ = ["main"]

if __name__ == "__main__":
    from .run import launch

    launch(sys.argv[1:], main)
