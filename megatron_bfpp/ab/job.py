"""The words of a job: CONFIG with what the settings change of it, the flags of an arm, and the trainer's own."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

from ..console.errors import UserError
from ..schedule import PipelineShape
from ..schedule.names import SCHEDULES
from .launchers import Launcher
from .settings import Settings

ARMS = tuple(word for word, schedule in SCHEDULES.items() if schedule.flags)
_LAYOUT, _PATTERN = "--pipeline-model-parallel-layout", "--hybrid-layer-pattern"
_CHUNKS = ("--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage")
_GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
_FSDP2 = "--use-torch-fsdp2"
_CONNECTIONS, _MOST_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS", "32"
# Megatron refuses the first two with FSDP2 (docs/guide/fully_sharded.md), and the third without model chunks.
_NOT_SHARDED = ("--use-distributed-optimizer", "--overlap-param-gather", "--overlap-param-gather-with-optimizer-step")
_NOT_WITHOUT_CHUNKS = ("--overlap-param-gather-with-optimizer-step",)


@dataclass(frozen=True)
class Job:
    """The part of a job that all arms have in common. environment: of the ranks. microbatches: of a step."""

    flags: list[str]
    environment: dict[str, str]
    microbatches: int

    @classmethod
    def read(cls, settings: Settings, launcher: Launcher, with_chunks: bool = True) -> Self:
        """Read CONFIG and apply the settings. UserError for sizes that do not divide.

        with_chunks: fix the chunks. Every arm must have the same on the same ranks, or the placements are compared and
        not the schedules.
        """
        from ..console.config_file import load  # needs PyYAML, which other words of bfpp do without

        environment, flags = load(settings.config)
        for flag, given in (
            ("--tensor-model-parallel-size", settings.tp), ("--pipeline-model-parallel-size", settings.pp),
            ("--micro-batch-size", settings.mbs), ("--global-batch-size", settings.gbs),
        ):  # fmt: skip
            flags += [flag, str(given)] if given else []
        job = cls(flags, environment, _microbatches(flags, launcher))
        return replace(job, flags=[*flags, *_chunks(flags, settings)]) if with_chunks else job

    def arm(self, word: str) -> Self:
        """Return the job with the flags of a schedule."""
        schedule = SCHEDULES[word]
        flags = self.flags
        if schedule.chunks and schedule.order is not None and "1f1b" in schedule.flags:
            shape = PipelineShape(_number(flags, "--pipeline-model-parallel-size", 1), 2, self.microbatches)
            try:  # of Megatron's own arms: it would refuse each of their runs, after the others have run
                schedule.order(shape, _number(flags, _GROUP, 0) or None)
            except UserError as error:
                raise UserError(f"ARMS: {word}: {error}\n  GBS, or --global-batch-size, sets them.") from None
        if _FSDP2 in schedule.flags:
            flags = [flag for flag in flags if flag not in _NOT_SHARDED]
        if not schedule.chunks:
            for flag in (_LAYOUT, _PATTERN):
                if flag in flags:
                    raise UserError(f"ARMS: {word} has one chunk per rank, and CONFIG's {flag} others; leave one out")
            flags = [flag for flag in _without_values(flags, _CHUNKS) if flag not in _NOT_WITHOUT_CHUNKS]
        return replace(self, flags=[*flags, *schedule.flags_for(self.microbatches)])

    def words(self, settings: Settings, launcher: Launcher, flags: list[str], marks: Mapping[str, str]) -> list[str]:
        """Return the whole command of a run. flags: its own; marks: more variables of its ranks."""
        flags = [*self.flags, *flags, *shlex.split(settings.extra_args)]
        script = "pretrain_hybrid" if _PATTERN in flags else "pretrain_gpt"
        trainer = ["-m", f"megatron_bfpp.{script}", "--device", settings.device]
        if settings.megatron_path:
            trainer = ["-m", "megatron_bfpp.run", *trainer[2:], f"{settings.megatron_path}/{script}.py"]
        values = {_CONNECTIONS: os.environ.get(_CONNECTIONS, _connections(flags)), **self.environment, **marks}
        if _FSDP2 in flags and values[_CONNECTIONS] == "1":  # which Megatron refuses with FSDP2
            values[_CONNECTIONS] = _MOST_CONNECTIONS
        return launcher.job([f"{name}={value}" for name, value in values.items()], [*trainer, *flags])


def logging_flags(settings: Settings, name: str, folder: Path) -> list[str]:
    """Return the flags that log a run: to TensorBoard always, since Megatron logs to W&B only with it."""
    flags = ["--tensorboard-dir", str(folder / "tensorboard")]
    if settings.wandb_project:
        flags += ["--wandb-project", settings.wandb_project, "--wandb-exp-name", name]
        flags += ["--wandb-save-dir", str(settings.output / "wandb")]
    return flags


def _microbatches(flags: list[str], launcher: Launcher) -> int:
    """Return the micro-batches of a step. UserError where ranks or batch do not divide."""
    pp, tp, cp = (
        _number(flags, f"--{name}-parallel-size", 1) for name in ("pipeline-model", "tensor-model", "context")
    )
    mbs, gbs = _number(flags, "--micro-batch-size", 1), _number(flags, "--global-batch-size", 0)
    nodes, ranks = launcher.nodes, launcher.ranks_per_node
    replicas, rest = divmod(nodes * ranks, pp * tp * cp)
    if pp < 2:
        raise UserError("there are no pipeline ranks, and so no schedule to compare: set PP to 2 or more")
    if rest or not replicas:
        raise UserError(f"{nodes} nodes x {ranks} GPUS_PER_NODE = {nodes * ranks} ranks are no multiple of the "
                        f"{pp * tp * cp} of a replica\n  (PP {pp} x TP {tp} x CP {cp})")  # fmt: skip
    if gbs < 1 or gbs % (mbs * replicas):
        raise UserError(f"GBS={gbs} is no multiple of MBS {mbs} x {replicas} replicas: set GBS or MBS")
    return gbs // (mbs * replicas)


def _connections(flags: list[str]) -> str:
    """Return 1 where Megatron demands it before Blackwell, else the most: what waits then holds up nothing else."""
    divided = any(_number(flags, f"--{name}-parallel-size", 1) > 1 for name in ("tensor-model", "context"))
    return "1" if divided else _MOST_CONNECTIONS


def _chunks(flags: list[str], settings: Settings) -> list[str]:
    """Return the flags that give every arm the same chunks; none where CONFIG does. UserError where no number fits."""
    if _PATTERN in flags:
        pattern = flags[len(flags) - flags[::-1].index(_PATTERN)]
        if settings.vp or "|" not in pattern:
            given = f"VP={settings.vp}" if settings.vp else "a pattern without |"
            raise UserError(f"CONFIG: {_PATTERN} gives every arm the same chunks by its |, and not with {given}:\n"
                            "  take the cut that `bfpp check --config CONFIG` says the plugin makes")  # fmt: skip
        return []
    if settings.vp:
        return [_CHUNKS[0], str(settings.vp)]
    if any(flag in flags for flag in (*_CHUNKS, _LAYOUT)):
        return []
    layers, pp = _number(flags, "--num-layers", 0), _number(flags, "--pipeline-model-parallel-size", 1)
    if layers % pp or layers < 2 * pp:
        raise UserError(f"VP is not set, and {layers} layers do not give each of {pp} pipeline ranks 2 or more:\n"
                        "  set VP, the model chunks per rank, for all arms")  # fmt: skip
    return [_CHUNKS[0], str(layers // pp)]


def _number(flags: list[str], name: str, default: int) -> int:
    """Return the last value of a flag. UserError for one that is no positive number."""
    values = [value for flag, value in pairwise(flags) if flag == name]
    if values and not (values[-1].isascii() and values[-1].isdigit() and int(values[-1]) > 0):
        raise UserError(f"CONFIG: {name} {values[-1]} must be a whole number, at least 1")
    return int(values[-1]) if values else default


def _without_values(flags: list[str], names: tuple[str, ...]) -> list[str]:
    """Return the flags less those of `names` and their values."""
    return [flag for before, flag in zip(["", *flags], flags) if flag not in names and before not in names]
