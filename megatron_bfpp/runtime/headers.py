"""Headers of messages, for variable shapes and --bfpp-debug-p2p: a wrong order is an error and not a hang.

A header is 8 integers: stage, op and microbatch of the send, dtype, and the tensor's 3 sizes with their number. It is a
tensor of the CPU whatever the device of the message is, and travels over gloo: as the messages it is matched by its
order alone, and as their channels do its tag keeps the two kinds of message apart.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from ..schedule.ir import Action, Op

SIZE = 8
_OPS = list(Op)
_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


class Header(NamedTuple):
    """The send of a message and the tensor that follows."""

    send: Action
    dtype: torch.dtype | None  # None for one that is not listed here
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.send} of {self.sizes} {str(self.dtype).removeprefix('torch.')}"


class OnTheWay(NamedTuple):
    """A launched send or receive of a header."""

    handle: dist.Work | None
    numbers: torch.Tensor


def send(action: Action, tensor: torch.Tensor, target: int, group: dist.ProcessGroup) -> OnTheWay:
    """Launch the header of `tensor`, which SEND_F or SEND_B sends."""
    numbers = write(action, tensor)
    return OnTheWay(dist.isend(numbers, target, group, _tag(action.op)), numbers)


def receive(op: Op, source: int, group: dist.ProcessGroup) -> OnTheWay:
    """Launch the receive of the header of the next message of RECV_F or RECV_B."""
    numbers = torch.empty(SIZE, dtype=torch.int64)
    return OnTheWay(dist.irecv(numbers, source, group, _tag(op)), numbers)


def _tag(op: Op) -> int:
    return int(op in (Op.SEND_B, Op.RECV_B))


def write(send: Action, tensor: torch.Tensor) -> torch.Tensor:
    """Return the header of `tensor`, which has at most 3 dimensions."""
    sizes = list(tensor.shape)
    dtype = _DTYPES.index(tensor.dtype) if tensor.dtype in _DTYPES else -1
    numbers = [send.stage, _OPS.index(send.op), send.microbatch, dtype, len(sizes), *sizes, *[0] * (3 - len(sizes))]
    return torch.tensor(numbers, dtype=torch.int64)


def read(header: torch.Tensor) -> Header:
    """Read back what `write` wrote. ValueError if the numbers cannot be a header."""
    numbers = header.tolist()
    stage, op, microbatch, dtype, dimensions = numbers[:5]
    if not (0 <= op < len(_OPS) and -1 <= dtype < len(_DTYPES) and 0 <= dimensions <= 3):
        raise ValueError(f"{numbers} is no header of a message")
    return Header(
        Action(stage, _OPS[op], microbatch), None if dtype < 0 else _DTYPES[dtype], tuple(numbers[5 : 5 + dimensions])
    )
