"""Count what a rank sends: the collectives and messages of its process groups, and their bytes.

Calls are counted on torch's ProcessGroup, which all of torch.distributed's functions, Megatron and FSDP2 come down to.
Bytes are those that a rank sends in a ring: (n-1)/n of what an all-gather gives or a reduce-scatter takes among n
ranks, twice that of an all-reduce. Groups of one rank send nothing. Not seen: collectives that C++ launches by itself
(torch's own DistributedDataParallel) and functional ones (DTensor's), which Megatron's training step does not use.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from .. import seams

# Methods of ProcessGroup by kind; names differ between releases of torch. The number of the argument that has all the
# data, and how often that goes round the ring.
_KINDS: tuple[tuple[str, int, float, str], ...] = (
    ("all-reduce", 0, 2.0, "allreduce allreduce_coalesced"),
    ("all-gather", 0, 1.0, "allgather allgather_coalesced _allgather_base allgather_into_tensor_coalesced"),
    ("all-gather", 0, 1.0, "all_gather_single all_gather_single_coalesced"),
    ("reduce-scatter", 1, 1.0, "reduce_scatter _reduce_scatter_base reduce_scatter_tensor_coalesced"),
    ("reduce-scatter", 1, 1.0, "reduce_scatter_single reduce_scatter_single_coalesced"),
    ("all-to-all", 1, 1.0, "alltoall alltoall_base all_to_all_single"),
    ("broadcast", 0, 1.0, "broadcast"),
    ("send", 0, 0.0, "send"),
)


@dataclass(eq=False)
class Traffic:
    """The calls and bytes sent since the last `taken`, by (name of the group, kind)."""

    name: Callable[[dist.ProcessGroup, str], str]  # of a group, given the kind
    counts: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))

    def install(self) -> None:
        """Count from now on, until `remove` or `seams.undo_all`."""
        if seams.is_applied(self):
            return
        with seams.together(self) as undo:
            for kind, argument, rounds, methods in _KINDS:
                for method in methods.split():
                    real = getattr(dist.ProcessGroup, method, None)
                    if real is not None:
                        seams.put(undo, dist.ProcessGroup, method, self._counting(real, kind, argument, rounds))

    def remove(self) -> None:
        """Count no longer."""
        seams.undo(self)

    def taken(self) -> dict[str, dict[str, int]]:
        """Return {"data-parallel all-gather": {"calls": 6, "bytes": 1048576}, ...}, and begin again."""
        found = {
            f"{group} {kind}": {"calls": int(calls), "bytes": round(sent)}
            for (group, kind), (calls, sent) in sorted(self.counts.items())
        }
        self.counts.clear()
        return found

    def _counting(self, real: Callable[..., Any], kind: str, argument: int, rounds: float) -> Callable[..., Any]:
        def wrapper(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            ranks = group.size()
            if ranks > 1:
                given = args[argument] if argument < len(args) else list(kwargs.values())[argument - len(args)]
                sent = sum(tensor.nbytes for tensor in tree_leaves(given))
                count = self.counts[self.name(group, kind), kind]
                count[0] += 1
                count[1] += sent * rounds * (ranks - 1) / ranks if rounds else sent
            return real(group, *args, **kwargs)

        return wrapper
