import sys

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")


@pytest.fixture
def validated(monkeypatch, capsys):
    """Return a function that has Megatron validate a command line with the plugin, on a CPU."""
    from megatron.training import arguments

    from megatron_bfpp.integration.flags.settings import add_flags
    from megatron_bfpp.integration.validation import Validation

    def with_flags(parser):
        add_flags(parser, default="1f1b")
        return parser

    def validate(words, world_size):
        """Return the arguments, and the lines that the plugin prints, less those about the CPU."""
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        args = arguments.parse_args(with_flags)
        capsys.readouterr()
        Validation("cpu", lambda: None).of_args(arguments.validate_args, args)
        lines = capsys.readouterr().out.split("megatron_bfpp 0.1.0: ")[1:]
        return args, [line.strip() for line in lines if not line.startswith("on a CPU")]

    return validate
