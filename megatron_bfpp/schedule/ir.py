"""Schedule IR: the ordered actions of every pipeline rank.

An action prints as PyTorch prints it (`2F0` = forward of microbatch 0 on stage 2), so that a schedule saved by
`formats.to_csv` also loads in torch.distributed.pipelining.

Index conventions, used everywhere in this package:
    pp_rank     0 <= pp_rank    < pp_size               rank in the pipeline-parallel group
    chunk       0 <= chunk      < num_chunks            model chunk held by a rank (Megatron's vp_stage)
    stage       0 <= stage      < pp_size * num_chunks  position in the whole model, stage 0 = embedding
    microbatch  0 <= microbatch < num_microbatches      slice of the batch of one data-parallel replica
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from ..console.errors import UserError


class Op(StrEnum):
    """The kinds of action, named as in torch.distributed.pipelining."""

    F = "F"  # forward of a microbatch through a stage
    B = "B"  # backward, of weights and input together
    I = "I"  # noqa: E741 - backward of the input alone: the gradient that the previous stage waits for
    W = "W"  # backward of the weights: what an I of the same microbatch has left over
    SEND_F = "SEND_F"  # launch the send of a stage's output to the next stage
    RECV_F = "RECV_F"  # post the receive of a stage's input; the F that needs it waits for it
    SEND_B = "SEND_B"  # launch the send of the gradient of a stage's input to the previous stage
    RECV_B = "RECV_B"  # post the receive of the gradient of a stage's output; the B that needs it waits for it
    UNSHARD = "UNSHARD"  # launch the all-gather of a chunk's parameters
    RESHARD = "RESHARD"  # free the gathered parameters of a chunk; its shard stays
    REDUCE_GRAD = "REDUCE_GRAD"  # launch the data-parallel reduction of a chunk's gradients

    # Actions are looked up several times per micro-batch and stage; an Enum's own hash is a Python function.
    __hash__ = str.__hash__


COMPUTE = frozenset({Op.F, Op.B, Op.I, Op.W})
BACKWARDS = frozenset({Op.B, Op.I})  # of these the input's gradient comes, which SEND_B sends
PASSES = BACKWARDS | {Op.F}  # those that other ranks wait for, and that wait for messages: all but W
SENDS = frozenset({Op.SEND_F, Op.SEND_B})
RECEIVES = frozenset({Op.RECV_F, Op.RECV_B})
CHUNK_OPS = frozenset({Op.UNSHARD, Op.RESHARD, Op.REDUCE_GRAD})  # of a whole chunk: no microbatch
MESSAGE = {Op.F: Op.RECV_F, Op.B: Op.RECV_B, Op.I: Op.RECV_B}  # the receive that a compute action waits for

_OPS = "|".join(sorted((op.value for op in Op), key=len, reverse=True))
_PATTERN = re.compile(rf"(\d+)({_OPS})(\d*)", re.ASCII)


class Action(NamedTuple):
    """One step of one rank. The stage is always the one the rank holds: `3SEND_F1` sends stage 3's output."""

    stage: int
    op: Op
    microbatch: int | None = None  # None for the ops in CHUNK_OPS

    def __str__(self) -> str:
        stage, op, microbatch = self
        return f"{stage}{op!s}" if microbatch is None else f"{stage}{op!s}{microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Return the action that prints as `text`; raise ValueError for any other text."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            word = text if len(text) <= 40 else text[:37] + "..."
            raise ValueError(f"{word!r} is not an action; expected for example 2F0, 3SEND_B1 or 2REDUCE_GRAD")
        op = Op(match[2])
        if (op in CHUNK_OPS) != (match[3] == ""):
            raise ValueError(f"{text!r}: {op.value} takes {'no' if op in CHUNK_OPS else 'a'} microbatch")
        return cls(int(match[1]), op, int(match[3]) if match[3] else None)


Schedule = list[list[Action]]  # [pp_rank][position]; compute only: an order; lowered: a plan


@dataclass(frozen=True)
class PipelineShape:
    """Sizes of a pipeline with looping placement: stage s is chunk s // pp_size of pp_rank s % pp_size."""

    pp_size: int  # P >= 2
    num_chunks: int  # V >= 1
    num_microbatches: int  # M >= 1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("pp_size", self.pp_size, 2),
            ("num_chunks", self.num_chunks, 1),
            ("num_microbatches", self.num_microbatches, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} is {value!r}; it must be an integer of at least {least}")

    @cached_property
    def num_stages(self) -> int:
        return self.pp_size * self.num_chunks

    def rank_of(self, stage: int) -> int:
        return stage % self.pp_size

    def chunk_of(self, stage: int) -> int:
        return stage // self.pp_size

    def edges_between_nodes(self, node_size: int) -> list[bool]:
        """Return for each edge of the ring of ranks whether it leaves a node of `node_size` ranks.

        Edge e joins ranks e and e + 1.
        """
        return [rank // node_size != (rank + 1) % self.pp_size // node_size for rank in range(self.pp_size)]

    def stages_on(self, pp_rank: int) -> range:
        """Return the stages of a rank, first chunk first."""
        return range(pp_rank, self.num_stages, self.pp_size)


Channel = tuple[Op, int, int]  # (SEND_F or SEND_B, sending pp_rank, receiving pp_rank)
Communicator = tuple[Op, int]  # (SEND_F or SEND_B, colour of the edge)

# A sent tensor may be reused this many compute actions, W's not counted, after its send was launched. By then the
# receiver has posted its receive (`lower.add_send_recv`), and the wait costs nothing. With 1, the send would stand in
# the way of the very next forward, as it does in Megatron since 0.18 (PR 4047).
SEND_WINDOW = 2

# Where the other end of a message is: how many stages on, and its op.
_PEER = {Op.SEND_F: (1, Op.RECV_F), Op.RECV_F: (-1, Op.SEND_F), Op.SEND_B: (-1, Op.RECV_B), Op.RECV_B: (1, Op.SEND_B)}


def peer(action: Action, shape: PipelineShape) -> Action | None:
    """Return the receive that belongs to the send `action`, or the send that belongs to the receive.

    None at the two ends of the model, where nothing is sent.
    """
    step, other = _PEER[action.op]
    stage = action.stage + step
    return Action(stage, other, action.microbatch) if 0 <= stage < shape.num_stages else None


def channel(send: Action, shape: PipelineShape) -> Channel:
    """Return the in-order channel of a send: one kind of message, in one direction, between one pair of ranks.

    NCCL matches the sends and receives of a pair of ranks by order alone. With a channel to itself, each kind keeps the
    sender's own order, and neither kind of traffic can block the other. With 2 ranks the forward traffic of both ranks
    would share a pair, so channels are directed.
    """
    received = peer(send, shape)
    assert received is not None, f"{send} has no receiver"
    return send.op, shape.rank_of(send.stage), shape.rank_of(received.stage)


def communicator(key: Channel, pp_size: int) -> Communicator:
    """Return (kind, colour): the communicator, a process group of all ranks, that carries a channel.

    The operations of a rank on one communicator may be serialized (torch does that where it initializes NCCL eagerly),
    so no two channels of a rank may share one: a receive that is posted ahead would stand in the way of later sends.
    Edge e of the ring joins ranks e and e + 1; its colour is e mod 2, and 2 for the last edge of an odd ring. Edges
    that meet in a rank thus differ in colour, and a rank has one direction of one kind of message on a communicator.
    """
    kind, source, target = key
    edge = source if kind is Op.SEND_F else target
    return kind, 2 if pp_size % 2 and edge == pp_size - 1 else edge % 2
