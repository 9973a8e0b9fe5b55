"""The question to the process of a rank in a dry run, and its answer: data that passes between processes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """A job. words: Megatron's command line. environment: of the process, with the configuration's variables.

    passes_over: why words that Megatron does not know are passed over; "" where they are refused. notes: lines about
    how the job's file was read.
    """

    words: list[str]
    environment: dict[str, str]
    world_size: int
    gpus_per_node: int
    capability: int | None  # major compute capability of the GPUs
    passes_over: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """A chunk as Megatron built it, on this tensor-parallel rank. layers: parameters by number in the model, from 1."""

    stage: int
    layers: dict[int, int]
    parameters: int


@dataclass(frozen=True)
class PlanLine:
    """A checked plan; unsound: the reason, or ""."""

    what: str
    num_microbatches: int
    digest: str = ""
    bubble_fraction: float = 0.0
    unsound: str = ""
    owed: tuple[int, ...] = ()  # on each rank, the most micro-batches whose weights' gradients wait; () for none


@dataclass(frozen=True)
class Job:
    """The job as validated. stage_layers: decoder layers of every stage in order; stage_kinds: of a hybrid model, a
    letter for each of them, else "".
    """

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
    stage_kinds: list[str]
    told: list[str]  # by the plugin, while it checked the command line
    changed: list[str]  # for the dry run
    vocab_size: int = 0  # words of the tokenizer, before padding


@dataclass(frozen=True)
class Rank:
    """The answer: the job, alike on all ranks, this rank's chunks, and the plans if it is the first rank examined."""

    pp_rank: int
    job: Job
    chunks: list[Chunk]
    plans: list[PlanLine] = field(default_factory=list)
