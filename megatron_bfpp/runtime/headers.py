"""Headers that precede messages under --bfpp-debug-p2p, so that a wrong order is an error and not a hang.

A header is 8 integers: stage, op and microbatch of the send, dtype, and the tensor's 3 sizes with their number.
"""

from typing import NamedTuple

import torch

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


def write(send: Action, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the header of `tensor`, which has at most 3 dimensions."""
    sizes = list(tensor.shape)
    dtype = _DTYPES.index(tensor.dtype) if tensor.dtype in _DTYPES else -1
    numbers = [send.stage, _OPS.index(send.op), send.microbatch, dtype, len(sizes), *sizes, *[0] * (3 - len(sizes))]
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def read(header: torch.Tensor) -> Header:
    """Read back what `write` wrote. ValueError if the numbers cannot be a header."""
    numbers = header.tolist()
    stage, op, microbatch, dtype, dimensions = numbers[:5]
    if not (0 <= op < len(_OPS) and -1 <= dtype < len(_DTYPES) and 0 <= dimensions <= 3):
        raise ValueError(f"{numbers} is no header of a message")
    return Header(
        Action(stage, _OPS[op], microbatch), None if dtype < 0 else _DTYPES[dtype], tuple(numbers[5 : 5 + dimensions])
    )
