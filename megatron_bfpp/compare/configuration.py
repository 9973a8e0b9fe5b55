"""Finds where configurations of runs differ, and whether in the schedule alone. Standard library only."""

import re
from typing import Any

from .runs import Run, section, text

Differences = dict[str, tuple[str, str]]  # setting: its value in the one run and in the other

# Where a run writes, what it is called, which process wrote the file: nothing of this changes what is computed.
_PLACES = frozenset({
    "save", "tensorboard_dir", "wandb_save_dir", "wandb_exp_name", "wandb_project", "wandb_entity",
    "bfpp_run_dir", "data_cache_path", "rank", "local_rank", "BFPP_ARM", "BFPP_ROUND", "BFPP_RUN_NAME", "BFPP_RUN_DIR",
    "WANDB_RUN_GROUP",
})  # fmt: skip
# In these arms may differ: the order of a step's forwards and backwards, and what its flags in schedule/names.py set.
_SCHEDULE = re.compile(
    r"pipeline_schedule|breadth_first_\w+|microbatch_group_size_per_vp_stage|overlap_p2p_comm_warmup_flush"
)
# Full sharding, and what Megatron demands with --use-torch-fsdp2 or sets for it.
_SHARDING = "use_torch_fsdp2"
_WITH_SHARDING = frozenset({
    _SHARDING, "use_distributed_optimizer", "overlap_param_gather", "align_param_gather",
    "gradient_accumulation_fusion", "ckpt_format", "high_priority_stream_groups", "CUDA_DEVICE_MAX_CONNECTIONS",
})  # fmt: skip
# An arm without model chunks ("1f1b"), and what Megatron demands or sets without them.
_CHUNKS = "virtual_pipeline_model_parallel_size"
_WITHOUT_CHUNKS = frozenset({
    _CHUNKS, "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage", "overlap_p2p_comm",
    "align_param_gather", "overlap_param_gather_with_optimizer_step",
})  # fmt: skip
_SECTIONS = (("args", ""), ("environment", ""), ("versions", "version of "), ("commits", "commit of "))


def differences(one: Run, other: Run) -> Differences:
    """Return every setting in which two runs differ. A part that one of them did not record is left out."""
    found: Differences = {}
    for name, prefix in _SECTIONS:
        ours, theirs = (_part(run, name) for run in (one, other))
        if not ours or not theirs:
            continue
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in _PLACES and (key in ours, ours.get(key)) != (key in theirs, theirs.get(key)):
                found[prefix + _shown(key)] = _value(ours, key), _value(theirs, key)
    for key, label in (("device", "device"), ("tokens_per_step", "tokens per step"), ("world_size", "world size")):
        ours, theirs = (section(run.header, "shape") if key == "world_size" else run.header for run in (one, other))
        if key in ours and key in theirs and ours[key] != theirs[key]:
            found[label] = _value(ours, key), _value(theirs, key)
    return found


def unexpected(found: Differences) -> list[str]:
    """Return the settings in which two arms differ beyond the schedule and what follows from full sharding."""
    allowed = _WITH_SHARDING if _SHARDING in found else frozenset()
    if "None" in found.get(_CHUNKS, ()):
        allowed |= _WITHOUT_CHUNKS
    return [name for name in found if not _SCHEDULE.fullmatch(name) and name not in allowed]


def unknown(run: Run) -> bool:
    """Return whether the run did not record its configuration."""
    return not section(run.header, "args")


def _part(run: Run, name: str) -> dict[str, Any]:
    """Return a part of run.json, without the commit that Megatron-Core adds to its version.

    That is the commit of whatever repository lies around it: Megatron would seem to change with each commit there.
    """
    values = section(run.header, name)
    version = values.get("megatron-core")
    return values | {"megatron-core": version.partition("+")[0]} if isinstance(version, str) else values


def _value(values: dict[str, Any], key: str) -> str:
    return _shown(repr(values[key])) if key in values else "(not there)"


def _shown(words: str) -> str:
    return text(words)[:200] or repr(words)
