"""What the process of a rank is asked in a dry run, and what it answers: data that passes between processes. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """words: Megatron's command line. environment: of the process, with the variables of the configuration."""

    words: list[str]
    environment: dict[str, str]
    world_size: int
    gpus_per_node: int
    capability: int | None  # major compute capability of the GPUs


@dataclass(frozen=True)
class Chunk:
    """As Megatron built it, in parameters of this tensor-parallel rank. layers: number in the model, from 1: parameters."""

    stage: int
    layers: dict[int, int]
    parameters: int


@dataclass(frozen=True)
class PlanLine:
    """A checked plan, or how it is unsound."""

    what: str
    num_microbatches: int
    digest: str = ""
    bubble_fraction: float = 0.0
    unsound: str = ""


@dataclass(frozen=True)
class Job:
    """What validation made of the command line. stage_layers: decoder layers of every stage in order."""

    tp: int
    pp: int
    dp: int
    chunks: int
    micro_batch: int
    global_batch: int
    num_microbatches: int
    schedule: str
    backward: str
    group: int | None
    resident_chunks: int | None
    stage_layers: list[int]
    told: list[str]  # by the plugin, while it checked the command line
    changed: list[str]  # for the dry run


@dataclass(frozen=True)
class Rank:
    """The answer: the job, alike on all ranks, this rank's chunks, and the plans if this is the first rank to be examined."""

    pp_rank: int
    job: Job
    chunks: list[Chunk]
    plans: list[PlanLine] = field(default_factory=list)
