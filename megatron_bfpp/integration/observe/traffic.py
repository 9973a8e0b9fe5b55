"""Count what a rank sends: the collectives and messages of its process groups, and their bytes.

Counted are the calls on torch's ProcessGroup, which all of torch.distributed's functions, Megatron and FSDP2 come down to. Bytes are
those that a rank sends in a ring: (n-1)/n of what an all-gather gives or a reduce-scatter takes among n ranks, twice
that of an all-reduce. Groups of one rank send nothing. Not seen: collectives that C++ launches by itself (torch's own
DistributedDataParallel) and functional ones (DTensor's), which Megatron's training step does not use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# Method of ProcessGroup -> kind, which argument has all the data, how often that goes round the ring. Names differ between releases of torch.
_METHODS: dict[str, tuple[str, int, float]] = {
    "allreduce": ("all-reduce", 0, 2.0),
    "allreduce_coalesced": ("all-reduce", 0, 2.0),
    "allgather": ("all-gather", 0, 1.0),
    "allgather_coalesced": ("all-gather", 0, 1.0),
    "_allgather_base": ("all-gather", 0, 1.0),
    "allgather_into_tensor_coalesced": ("all-gather", 0, 1.0),
    "all_gather_single": ("all-gather", 0, 1.0),
    "all_gather_single_coalesced": ("all-gather", 0, 1.0),
    "reduce_scatter": ("reduce-scatter", 1, 1.0),
    "_reduce_scatter_base": ("reduce-scatter", 1, 1.0),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1, 1.0),
    "reduce_scatter_single": ("reduce-scatter", 1, 1.0),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1, 1.0),
    "alltoall": ("all-to-all", 1, 1.0),
    "alltoall_base": ("all-to-all", 1, 1.0),
    "all_to_all_single": ("all-to-all", 1, 1.0),
    "broadcast": ("broadcast", 0, 1.0),
    "send": ("send", 0, 0.0),
}


@dataclass
class Traffic:
    """What was sent since the last `taken`: (name of the group, kind) -> calls, bytes."""

    name: Callable[[dist.ProcessGroup, str], str]  # of a group, given the kind
    counts: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    _real: dict[str, Any] = field(default_factory=dict)

    def install(self) -> None:
        for method, how in _METHODS.items():
            real = getattr(dist.ProcessGroup, method, None)
            if real is not None and method not in self._real:
                self._real[method] = real
                setattr(dist.ProcessGroup, method, self._counting(real, *how))

    def remove(self) -> None:
        for method, real in self._real.items():
            setattr(dist.ProcessGroup, method, real)
        self._real.clear()

    def taken(self) -> dict[str, dict[str, int]]:
        """{"data-parallel all-gather": {"calls": 6, "bytes": 1048576}, ...}, and begin again."""
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
                sent = sum(map(_bytes, _tensors(given)))
                count = self.counts[self.name(group, kind), kind]
                count[0] += 1
                count[1] += sent * rounds * (ranks - 1) / ranks if rounds else sent
            return real(group, *args, **kwargs)

        return wrapper


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(given: torch.Tensor | Iterable[Any]) -> Iterator[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        yield given
    else:
        for each in given:
            yield from _tensors(each)
