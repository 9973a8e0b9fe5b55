"""Process groups that are destroyed and made anew behind the same objects, as slime does around generation.

Read at THUDM/slime 624b824a, slime/utils/reloadable_process_group.py: torch.distributed.new_group is replaced, and what
it returns stands for a group that can be exchanged. Functions that take a group are given the one it stands for.
"""

import hashlib
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

TAKE_A_GROUP = (
    "get_rank", "get_world_size", "get_backend", "get_global_rank", "get_group_rank", "get_process_group_ranks",
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "broadcast_object_list",
    "reduce_scatter_tensor", "barrier", "isend", "irecv", "send", "recv", "_coalescing_manager",
)  # fmt: skip
_groups: list["Reloadable"] = []
_generation = 0
_store: Any = None


class Reloadable(dist.ProcessGroup):
    """Stands for a group, with its methods. `inner` is None while it is destroyed."""

    def __init__(self, inner: Any, made_with: tuple[tuple[Any, ...], dict[str, Any]]):
        super().__init__(dist.get_rank(inner), dist.get_world_size(inner))
        self.inner, self.made_with = inner, made_with
        _groups.append(self)


def _forward(name: str, value: Any) -> Any:
    if isinstance(value, property):
        return property(lambda self: getattr(self.inner, name))
    return lambda self, *args, **kwargs: getattr(self.inner, name)(*args, **kwargs)


for _name in dir(dist.ProcessGroup):
    _value = getattr(dist.ProcessGroup, _name)
    if (
        not _name.startswith("__")
        and not isinstance(_value, type)
        and (callable(_value) or isinstance(_value, property))
    ):
        setattr(Reloadable, _name, _forward(_name, _value))


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Reloadable) else value


def _name_before_2_14(ranks: Any) -> str:
    """Name a group as torch did before 2.14: by how many groups this rank belongs to, in which ranks differ."""
    return hashlib.sha1(f"{ranks} {len(distributed_c10d._world.pg_names)}".encode()).hexdigest()


def install() -> None:
    """Replace what torch.distributed offers, before the world is made."""
    distributed_c10d._hash_ranks_to_str = _name_before_2_14

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return Reloadable(distributed_c10d.new_group(*args, **kwargs), (args, kwargs))

    def taking(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*map(_inner, args), **{name: _inner(value) for name, value in kwargs.items()})

        return call

    isend, irecv = dist.isend, dist.irecv

    def p2p_op(op: Any, *args: Any, **kwargs: Any) -> Any:
        op = {dist.isend: isend, dist.irecv: irecv}.get(op, op)  # torch compares it with its own
        return taking(distributed_c10d.P2POp)(op, *args, **kwargs)

    dist.new_group, dist.P2POp = new_group, p2p_op
    for name in TAKE_A_GROUP:
        setattr(dist, name, taking(getattr(dist, name)))


def destroy() -> None:
    """Destroy the world with all its groups; a world without groups of ours stands in."""
    global _store
    if _store is None:
        _store = distributed_c10d._get_default_store()
    dist.barrier()
    _new_world()
    for group in _groups:
        group.inner = None


def reload() -> None:
    """Make the world and all groups anew, in the order in which they were made."""
    dist.barrier()
    _new_world()
    for group in _groups:
        args, kwargs = group.made_with
        group.inner = distributed_c10d.new_group(*args, **kwargs)


def _new_world() -> None:
    global _generation
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    _generation += 1
    store = dist.PrefixStore(f"world {_generation}", _store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
