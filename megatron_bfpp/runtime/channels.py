"""Makes the process groups that carry the messages of a pipeline.

Decisions for GPUs, where this project cannot test, and their reasons:
  - Every communicator carries one direction of one kind of message (activations forward, gradients backward) between
    two ranks: the in-order streams that schedule/check.py proves. There is a process group for each kind and each
    colour of the ring's edges (`schedule.lower.communicator`), 4 groups with an even number of ranks, 6 with an odd
    one. torch then has such a communicator in both of its modes. Initialized lazily (Megatron's way), a group makes a
    communicator per pair of ranks. Initialized eagerly (init_process_group with a device_id), all messages of a group
    share one and are serialized: a receive posted ahead would block every later send. With 2 ranks both neighbours are
    one rank, and the colours keep their messages apart (Megatron uses the world's group for that).
  - The groups are made, and their communicators used once, in one fixed order before the first step. A communicator
    made lazily is a rendezvous of its own: isend does not return before the peer comes to its receive. Making them in
    the order of first use has hung Megatron (Megatron-LM PR 5240).
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..schedule.ir import RECEIVES, SENDS, Action, Channel, Op, PipelineShape, channel, communicator, peer


class Route(NamedTuple):
    """The group and the other end of the messages of one op of one stage."""

    group: dist.ProcessGroup
    peer: int  # global rank


class ChannelGroups:
    """The process groups that carry the channels of one pipeline group."""

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        device: torch.device,
        new_group: Callable[..., Any],
        timeout: timedelta | None = None,
        options: Any = None,
    ):
        """Make the groups, collectively over `pp_group` alone.

        new_group: makes a group of `ranks`, collectively over them, with the named options of torch's new_group.
        timeout, options: for new_group; None for its defaults.
        """
        self.ranks = dist.get_process_group_ranks(pp_group)
        self.pp_rank = pp_group.rank()
        self._routes: dict[PipelineShape, dict[tuple[int, Op], Route]] = {}
        self._has_run: set[bool] = set()
        size = len(self.ranks)
        edges = [(edge, (edge + 1) % size) for edge in range(size)]
        channels: list[Channel] = [(Op.SEND_F, *edge) for edge in edges] + [(Op.SEND_B, *edge[::-1]) for edge in edges]
        # By communicator, of whose channels no two have a rank in common: the pairs of ranks connect side by side.
        channels.sort(key=lambda each: communicator(each, size))
        self._groups = {
            key: new_group(
                self.ranks, timeout=timeout, backend=dist.get_backend(pp_group), pg_options=options,
                group_desc="BFPP_{}_{}".format(*key),
            )
            for key in dict.fromkeys(communicator(each, size) for each in channels)
        }  # fmt: skip
        for each in channels:
            self._connect(each, device)

    @property
    def groups(self) -> Iterable[dist.ProcessGroup]:
        """Return the process groups, of which each serves several routes."""
        return self._groups.values()

    def routes(self, shape: PipelineShape) -> dict[tuple[int, Op], Route]:
        """Return the route of each kind of message of each stage of this rank, by (stage, op)."""
        if shape not in self._routes:
            self._routes[shape] = dict(self._find_routes(shape))
        return self._routes[shape]

    def is_first(self, forward_only: bool) -> bool:
        """Return whether this is the first call for a step of this kind: all ranks of the pipeline know it."""
        is_first = forward_only not in self._has_run
        self._has_run.add(forward_only)
        return is_first

    def _find_routes(self, shape: PipelineShape) -> Iterator[tuple[tuple[int, Op], Route]]:
        for stage in shape.stages_on(self.pp_rank):
            for op in SENDS | RECEIVES:
                other = peer(Action(stage, op, 0), shape)
                if other is not None:
                    send = Action(stage, op, 0) if op in SENDS else other
                    key = communicator(channel(send, shape), shape.pp_size)
                    yield (stage, op), Route(self._groups[key], self.ranks[shape.rank_of(other.stage)])

    def _connect(self, key: Channel, device: torch.device) -> None:
        """Pass one number along a channel, so that its communicator exists before the first step."""
        _, source, target = key
        group = self._groups[communicator(key, len(self.ranks))]
        if self.pp_rank == source:
            dist.send(torch.zeros(1, device=device), self.ranks[target], group=group)
        elif self.pp_rank == target:
            dist.recv(torch.zeros(1, device=device), self.ranks[source], group=group)
