"""The files of a run, --bfpp-run-dir DIR: run.json at the start, a line of steps.jsonl per step, end.json at the end.

The last rank writes them, where Megatron has its losses. run.json is there before a model is built, so that a job that
dies of that leaves its configuration; it is written anew when training begins, with what Megatron has completed since.
A run that is resumed in the same folder continues steps.jsonl. end.json is missing while a run goes on, and after a
kill; the first rank that fails writes why. A file that cannot be written is a warning in the log: training goes on.
"""

import inspect
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...console.errors import UserError
from ...console.files import append_line
from ...console.version import __version__
from ..flags.batches import microbatches_now, shape_of
from ..flags.settings import is_sharded, settings_of, word_of_job
from ..process import megatron_args, say, versions, write_or_warn
from ..relied_on.training import DATA_ITERATORS, SETUP, TRAIN
from . import metrics

FORMAT = "megatron_bfpp run 1"
# The functions of Megatron that Run.around runs, and whether the files begin before and finish after them.
SEAMS = (
    (SETUP, True, False),
    (DATA_ITERATORS, False, False),
    (TRAIN, True, True),
)
# The variables of the environment that run.json keeps.
_NAMES = {"CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"}
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "NVTE_")


class Run:
    """The folder of a run. UserError if it cannot be made."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.steps = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"--bfpp-run-dir {folder} cannot be made: {error.strerror}"
            raise UserError(f"{reason}.\n  Name another folder.") from None

    def begin(self, args: Any) -> None:
        """Write run.json. Collective over all ranks."""
        if _writes():  # before any rank goes on, and may fail
            (self.folder / "end.json").unlink(missing_ok=True)
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        if _writes():
            self._write("run.json", describe(args, self.folder.resolve().name, sorted(set(hosts))))

    def add(self, step: int, entry: dict[str, Any]) -> None:
        """Add a step that has ended. To be called on every rank."""
        self.steps = step
        if _writes():
            try:
                append_line(self.folder / "steps.jsonl", entry)
            except OSError as error:
                say(f"WARNING: step {step} is missing in {self.folder / 'steps.jsonl'}: {error.strerror}")

    def end(self, reason: str | None = None) -> None:
        """Write end.json. reason: why the run has failed; None if it has not."""
        # Once one rank has failed, the others fail because of it.
        if _writes() if reason is None else not (self.folder / "end.json").exists():
            why = None if reason is None else f"rank {dist.get_rank()}: {reason}"
            end = {"status": "finished" if reason is None else "failed", "reason": why}
            self._write("end.json", {**end, "ended": _now(), "steps": self.steps})

    def around(self, begins: bool, finishes: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function of Megatron with which the run's files begin or finish; they end however it ends the job."""
        if begins:
            self.begin(megatron_args())
        try:
            answer = function(*args, **kwargs)
        except SystemExit as stop:  # Megatron's --exit-interval and --exit-duration-in-mins
            self.end(None if not stop.code else f"exit code {stop.code}")
            raise
        except BaseException as error:
            self.end(f"{type(error).__name__}: {error}")
            raise
        if finishes:
            self.end()
        return answer

    def _write(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=1, default=str) + "\n"
        write_or_warn(str(self.folder / name), text, "--bfpp-run-dir")


def describe(args: Any, name: str, hosts: list[str]) -> dict[str, Any]:
    """Return the content of run.json. args: Megatron's, validated."""
    from megatron.training.training import num_floating_point_operations

    settings, microbatches = settings_of(args), microbatches_now()
    shape = shape_of(args, microbatches)
    plan = None
    if shape is not None:
        ours = None if settings.schedule == "1f1b" else settings.plan_of(shape, is_sharded=is_sharded(args))
        plan = {"digest": ours and ours.digest, "bubble_fraction_predicted": metrics.predicted_bubble(args)}
    return {
        "format": FORMAT,
        "name": os.environ.get("BFPP_RUN_NAME") or name,
        "arm": os.environ.get("BFPP_ARM") or word_of_job(args, microbatches),
        "round": _round(),
        "pipeline_schedule": settings.schedule,
        "started": _now(),
        "args": json.loads(json.dumps(vars(args), default=str, sort_keys=True)),
        "environment": {
            key: value for key, value in sorted(os.environ.items()) if key in _NAMES or key.startswith(_PREFIXES)
        },
        "versions": {"megatron_bfpp": __version__, **versions()},
        "commits": {
            "megatron_bfpp": _commit(__file__), "megatron": _commit(inspect.getfile(num_floating_point_operations)),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "hosts": hosts,
        "shape": {
            "pp": args.pipeline_model_parallel_size, "chunks": args.virtual_pipeline_model_parallel_size or 1,
            "microbatches": microbatches,
            "dp": args.data_parallel_size, "tp": args.tensor_model_parallel_size, "cp": args.context_parallel_size,
            "world_size": args.world_size,
        },
        "plan": plan,
        "tokens_per_step": metrics.tokens_per_step(args),
        "flops_per_step": num_floating_point_operations(args, metrics.tokens_per_step(args) // args.seq_length),
    }  # fmt: skip


def _round() -> int | None:
    """Return the round of an A/B that this run belongs to, from the environment; rounds are compared."""
    value = os.environ.get("BFPP_ROUND", "")
    return int(value) if re.fullmatch(r"\d{1,6}", value, re.ASCII) else None


def _commit(file: str) -> str | None:
    """Return the short hash of the checkout that holds `file`; None for a file that git does not know."""
    git = ["git", "-C", str(Path(file).parent)]
    try:
        for command in (["ls-files", "--error-unmatch", file], ["rev-parse", "--short", "HEAD"]):
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout
        return None
    return done.stdout.strip()


def _writes() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
