"""One case of `bfpp bench`: what is emulated, and which arms run on it. Imports no torch: the parent needs none."""

from dataclasses import dataclass
from typing import Any

from ..schedule import PipelineShape
from ..schedule.costs import UNIT, Costs
from ..schedule.lower import DEFAULT_HOP
from ..schedule.names import SCHEDULES
from .emulate.shared_card import SharedCards

SHARDED = "breadth-first-sharded"  # fully, which takes data parallelism
FREE = ", free collectives"  # the variant of an arm whose data-parallel collectives take no time
# In the shared memory, per rank: until when its card sends and receives, and its link within the node does. The first
# of the two counts for both directions of a half-duplex card.
NUMBERS_PER_CARD = 4
ATTEMPTS = 4  # at a step that the machine held up; a host that is always too slow for the stages is part of the result


@dataclass(frozen=True)
class Case:
    """One shape on one network.

    costs: in seconds, of equal stages. A chunk has costs.buckets layers: each is a bucket where Megatron makes buckets,
        in the first chunk of the first rank, and a unit of FSDP.
    node_size: pipeline ranks in a node, within which messages have their own link, which nothing else uses.
    jitter: standard deviation of every duration, as a part of it.
    replicas: of the pipeline; 1 for no data-parallel traffic.
    connections: hardware queues of a GPU, 1 or one for each stream.
    hop, weight_lag: this plugin's flags: the latency for which it places receives, in forwards of a chunk, and the most
        micro-batches whose weights' gradients a rank owes, None for no limit.
    """

    shape: PipelineShape
    costs: Costs = UNIT
    network: str = "free"  # its name in tables
    node_size: int = 1
    full_duplex: bool = True
    jitter: float = 0.0
    replicas: int = 1
    arms: tuple[str, ...] = tuple(SCHEDULES)
    repeat: int = 1
    connections: int = 32
    hop: float = DEFAULT_HOP
    weight_lag: int | None = None

    @property
    def ranks(self) -> int:
        return self.shape.pp_size * self.replicas

    @property
    def shares_card(self) -> bool:
        """Return whether collectives share the card with messages; else they have one of their own."""
        shared = self.costs.shared_card
        return shared if isinstance(shared, bool) else any(shared)

    @property
    def variants(self) -> tuple[str, ...]:
        """Name the variants of each arm: with data parallelism also one whose collectives take no time."""
        return ("", FREE) if self.replicas > 1 else ("",)


@dataclass(frozen=True)
class Memory:
    """The memory that the ranks of a case share. port: of rank 0's store, once it is open."""

    port: Any  # multiprocessing.Value("i")
    cards: Any  # multiprocessing.Array("d"), NUMBERS_PER_CARD of every rank
    shared: SharedCards | None  # where collectives share the card
