"""The comparison of all ranks before a model is built: flags, placement, plan, versions and environment.

The ranks compare through the store in which they met, so that nothing hangs where they differ in how they would
communicate. Every rank compares its own record with the first rank's; the first one collects the differences, and all
ranks learn them.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from ...console.errors import UserError
from ...console.version import __version__
from ..flags.batches import microbatch_counts, shape_of
from ..flags.settings import Settings, is_sharded
from ..flags.stages import check_placement
from ..process import versions

# Variables that change results or how ranks talk. Names of network interfaces may differ between nodes.
_NAMES = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE", "NCCL_NVLS_ENABLE",
    "NCCL_LAUNCH_MODE", "NCCL_CUMEM_ENABLE",
)  # fmt: skip
_PREFIXES = ("NVTE_", "TORCH_NCCL_")
_OF_A_RANK = {"rank", "local_rank"}
MOST_SHOWN = 3  # differences in one message


def agree(store: Any, mine: dict[str, str], rank: int, world_size: int, timeout_s: float) -> str:
    """Return a hash of what all ranks agree on. Collective; UserError on every rank if they differ.

    mine: what `record` returns. timeout_s: how long a rank may be late.
    """
    deadline = timedelta(seconds=timeout_s)
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


def record(args: Any, settings: Settings, **known: object) -> dict[str, str]:
    """Return what must be equal on all ranks, by the name under which a user knows it.

    args: Megatron's, or None. Where the plugin has not validated them, the trainer is not Megatron's: its arguments may
    differ between ranks, and say nothing of the placement; the settings are compared in their place.
    known: more, such as the sizes of the pipeline.
    """
    if getattr(args, "bfpp_has_validated", False):
        found = _flags(args) | _plan(args, settings)
    else:
        found = {f"the choice of {name}": str(value) for name, value in (asdict(settings) | known).items()}
    found |= {"the version of megatron_bfpp": f"{__version__} (source {_source()})"}
    found |= {f"the version of {name}": value or "not there" for name, value in versions().items()}
    names = {*_NAMES, *(name for name in os.environ if name.startswith(_PREFIXES))}
    return found | {f"the variable {name}": os.environ.get(name, "not set") for name in sorted(names)}


def differences(first: dict[str, str], mine: dict[str, str], rank: int) -> Iterator[str]:
    """Yield a phrase for each difference from the first rank. Paths may differ: a node may have its own."""
    for name in [*first, *(each for each in mine if each not in first)]:
        here, there = mine.get(name, "not known"), first.get(name, "not known")
        if here != there and not (os.sep in here and os.sep in there):
            yield f"{name} is {_short(here)} on rank {rank} and {_short(there)} on rank 0"


def _flags(args: Any) -> dict[str, str]:
    return {
        f"--{name.replace('_', '-')}": str(value) if not isinstance(value, set) else str(sorted(value, key=str))
        for name, value in vars(args).items()
        if name not in _OF_A_RANK and " at 0x" not in str(value)
    }


@cache
def _source() -> str:
    """Return a hash of this package's code: an editable checkout changes without its version."""
    folder = Path(__file__).parents[2]
    code = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return code.hexdigest()[:12]


def _plan(args: Any, settings: Settings) -> dict[str, str]:
    """Return placement and plan of the first step. The plan is checked here, before the model; step 1 uses it."""
    if settings.schedule == "1f1b":
        return {}
    found = {"the placement": check_placement(args)}
    shape = shape_of(args, microbatch_counts(args)[0])
    if shape is not None:
        found["the plan"] = settings.plan_of(shape, is_sharded=is_sharded(args)).digest
    return found


def _verdict(store: Any, world_size: int, deadline: timedelta) -> str:
    """Return the message for all ranks, empty if they agree."""
    found: list[str] = []
    ranks = 0
    for rank in range(1, world_size):
        theirs = json.loads(_get(store, f"agrees/{rank}", deadline, f"rank {rank}"))
        found += theirs
        ranks += bool(theirs)
    if not found:
        return ""
    shown = "; ".join(found[:MOST_SHOWN]) + (f"; and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else "")
    many = f"{ranks} of {world_size} ranks differ" if ranks > 1 else "a rank differs"
    return f"{many} from rank 0: {shown}.\n  Start all ranks with the same command, environment and packages."


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
