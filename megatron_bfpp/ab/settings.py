"""The settings of an A/B and of a training: flags, or environment variables of the same names."""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ..console.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # holds megatron_bfpp; in the repository also configs


def _setting(meaning: str, default: Any = "", least: int | None = None) -> Any:
    """Declare a setting. least: it is a whole number, at least this."""
    return field(default=default, metadata={"meaning": meaning, "least": least})


@dataclass(frozen=True)
class Settings:
    """The settings of every job; 0 and "" stand for a setting that is not given."""

    output_path: str = _setting("the directory that this writes to, on a file system that every node sees")
    config: str = _setting("a file of configs/: the model, and all that the arms have in common")
    steps: int = _setting("steps per run", 0, least=1)
    tp: int = _setting("tensor-parallel ranks; default: CONFIG's", 0, least=1)
    pp: int = _setting("pipeline ranks; default: CONFIG's", 0, least=1)
    vp: int = _setting("model chunks per pipeline rank; default: CONFIG's, else one per layer", 0, least=1)
    mbs: int = _setting("micro batch; default: CONFIG's", 0, least=1)
    gbs: int = _setting("global batch; default: CONFIG's", 0, least=1)
    nnodes: int = _setting("nodes; default: the allocation's", 0, least=1)
    gpus_per_node: int = _setting("ranks on each node; default: 8 under SLURM, else 4", 0, least=1)
    megatron_path: str = _setting("a checkout whose pretrain_gpt.py is run; default: megatron_bfpp.pretrain_gpt")
    python: str = _setting("the Python of the ranks; default: the one of bfpp, in a container python3")
    device: str = _setting("auto, cuda or cpu; default: auto", "auto")
    extra_args: str = _setting('more flags for every run, such as "--bfpp-trace-steps 20-22"')
    wandb_project: str = _setting("log to W&B, in the group WANDB_RUN_GROUP (default: OUTPUT_PATH's name)")
    container_image: str = _setting("SLURM: run in it (pyxis and enroot); it must have torch and megatron-core")
    container_mounts: str = _setting("SLURM: default: the repository, OUTPUT_PATH and MEGATRON_PATH; add your data")
    master_addr: str = _setting("SLURM: where the ranks meet; default: the name of the first node")
    master_port: int = _setting("SLURM: default: 29500", 29500, least=1)

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Add a flag per setting, and those that choose how jobs are started."""
        parser.add_argument("--dry-run", action="store_true", help="print what would run, and write nothing")
        parser.add_argument("--launcher", choices=("auto", "local", "slurm"), default="auto",
                            help="torchrun on this machine, or srun; default: srun inside an allocation")  # fmt: skip
        for each in fields(cls):
            flag = "--" + each.name.replace("_", "-")
            parser.add_argument(flag, metavar=each.name.upper(), help=each.metadata["meaning"].replace("%", "%%"))

    @classmethod
    def read(cls, args: argparse.Namespace, environment: Mapping[str, str]) -> Self:
        """Read every setting from its flag, else from the environment. UserError for values that cannot be."""
        values: dict[str, Any] = {}
        for each in fields(cls):
            name, least = each.name.upper(), each.metadata["least"]
            text = getattr(args, each.name) or environment.get(name, "")
            if not text:
                continue
            if least is not None and not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
                raise UserError(f"{name}={text} must be a whole number, at least {least}")
            values[each.name] = text if least is None else int(text)
        values.setdefault("python", "python3" if "container_image" in values else sys.executable)
        return cls(**values)

    def check(self) -> None:
        """Refuse settings that are missing and places that do not exist."""
        for name in ("output_path", "config"):
            if not getattr(self, name):
                meaning = next(each.metadata["meaning"] for each in fields(self) if each.name == name)
                raise UserError(f"{name.upper()} is not set: {meaning}")
        if not Path(self.config).is_file():
            raise UserError(f"CONFIG={self.config} does not exist; name a file of {ROOT / 'configs'}")
        if self.megatron_path and not Path(self.megatron_path, "pretrain_gpt.py").is_file():
            raise UserError(f"MEGATRON_PATH={self.megatron_path} has no pretrain_gpt.py; name a Megatron-LM checkout")

    @property
    def output(self) -> Path:
        """OUTPUT_PATH as an absolute path."""
        return Path(os.path.abspath(self.output_path))


@dataclass(frozen=True)
class ABSettings(Settings):
    """The settings of `bfpp ab`."""

    arms: str = _setting("words of schedules; the first is the reference. Default: interleaved interleaved-grouped "
                         "breadth-first, under SLURM also breadth-first-sharded")  # fmt: skip
    rounds: int = _setting("how often each arm runs; default: 3", 3, least=1)
    warmup: str = _setting("bfpp compare --warmup")
    loss_tolerance: str = _setting("bfpp compare --loss-tolerance")


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """The settings of one training with checkpoints."""

    save_interval: int = _setting("steps between checkpoints; default: 500", 500, least=1)
    pipeline_schedule: str = _setting("breadth-first or 1f1b; default: CONFIG's")
