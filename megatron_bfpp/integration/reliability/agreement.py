"""Before a model is built: do all ranks have the same flags, placement, plan, versions and environment?

The ranks compare through the store in which they met, so that nothing hangs where they differ in how they would communicate.
Every rank compares its own record with the first rank's; the first one collects what they found, and all ranks learn it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...console.errors import UserError
from ...console.version import __version__
from ..flags.batches import microbatch_counts, shape_of
from ..flags.settings import settings_of
from ..flags.stages import check_placement

# Of the environment, what changes results or how ranks talk. Names of network interfaces differ between nodes rightly.
_NAMES = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE", "NCCL_NVLS_ENABLE",
    "NCCL_LAUNCH_MODE", "NCCL_CUMEM_ENABLE",
)  # fmt: skip
_PREFIXES = ("NVTE_", "TORCH_NCCL_")
_OF_A_RANK = {"rank", "local_rank"}
MOST_TOLD = 3  # differences in one message


def agree(store: Any, args: Any, rank: int, world_size: int, timeout_s: float) -> str:
    """Collective over all ranks: a hash of what they agree on. UserError on every rank if they do not.

    args: Megatron's, validated. timeout_s: how long a rank may be late.
    """
    mine, deadline = record(args), timedelta(seconds=timeout_s)
    if rank == 0:
        store.set("record", json.dumps(mine))
        store.set("verdict", _verdict(store, world_size, deadline))
    else:
        first = json.loads(_get(store, "record", deadline, "rank 0"))
        store.set(f"agrees/{rank}", json.dumps(list(differences(first, mine, rank))))
    verdict = _get(store, "verdict", deadline, "rank 0")
    if verdict:
        raise UserError(verdict)
    return hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()[:12]


def record(args: Any) -> dict[str, str]:
    """What must be equal on all ranks, by the name under which a user knows it."""
    found = {
        f"--{name.replace('_', '-')}": str(value) if not isinstance(value, set) else str(sorted(value, key=str))
        for name, value in vars(args).items()
        if name not in _OF_A_RANK and " at 0x" not in str(value)
    }
    found |= _plan(args) | {f"the version of {name}": value for name, value in versions().items()}
    names = {*_NAMES, *(name for name in os.environ if name.startswith(_PREFIXES))}
    return found | {f"the variable {name}": os.environ.get(name, "not set") for name in sorted(names)}


def differences(first: dict[str, str], mine: dict[str, str], rank: int) -> Iterator[str]:
    """What `rank` has otherwise than the first rank, a phrase each. Paths may differ: a node may have its own."""
    for name in [*first, *(each for each in mine if each not in first)]:
        here, there = mine.get(name, "not known"), first.get(name, "not known")
        if here != there and not (os.sep in here and os.sep in there):
            yield f"{name} is {_short(here)} on rank {rank} and {_short(there)} on rank 0"


def versions() -> dict[str, str]:
    from megatron.core.package_info import __version__ as megatron_core

    found = {
        "megatron_bfpp": f"{__version__} (source {_source()})", "megatron-core": str(megatron_core),
        "torch": torch.__version__, "Python": sys.version.split()[0], "CUDA in torch": str(torch.version.cuda),
    }  # fmt: skip
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        found["Transformer Engine"] = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        found["Transformer Engine"] = "not installed"
    return found


@cache
def _source() -> str:
    """Hash of this package's code: an editable checkout changes without its version."""
    folder = Path(__file__).parents[2]
    code = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return code.hexdigest()[:12]


def _plan(args: Any) -> dict[str, str]:
    """Placement and plan of the first step. The plan is made and checked here, before the model; step 1 uses it."""
    settings = settings_of(args)
    if settings.schedule == "1f1b":
        return {}
    found = {"the placement": check_placement(args)}
    shape = shape_of(args, microbatch_counts(args)[0])
    if shape is not None:
        found["the plan"] = settings.plan_of(shape, is_sharded=getattr(args, "use_torch_fsdp2", False)).digest
    return found


def _verdict(store: Any, world_size: int, deadline: timedelta) -> str:
    """The message for all, empty if they agree."""
    found: list[str] = []
    ranks = 0
    for rank in range(1, world_size):
        theirs = json.loads(_get(store, f"agrees/{rank}", deadline, f"rank {rank}"))
        found += theirs
        ranks += bool(theirs)
    if not found:
        return ""
    told = "; ".join(found[:MOST_TOLD]) + (f"; and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else "")
    many = f"{ranks} of {world_size} ranks differ" if ranks > 1 else "a rank differs"
    return f"{many} from rank 0: {told}.\n  Start all ranks with the same command, environment and packages."


def _get(store: Any, key: str, deadline: timedelta, who: str) -> str:
    try:
        store.wait([key], deadline)
    except RuntimeError:  # torch.distributed.DistStoreError and DistNetworkError
        raise UserError(
            f"{who} has not compared its flags and versions with the others within {deadline.total_seconds():g} s.\n"
            "  Start every rank with megatron_bfpp, and look into that rank's log."
        ) from None
    return store.get(key).decode()  # type: ignore[no-any-return]


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
