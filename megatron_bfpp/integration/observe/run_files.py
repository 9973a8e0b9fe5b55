"""The files of a run, --bfpp-run-dir DIR: run.json at the start, a line of steps.jsonl per step, end.json at the end.

The last rank writes them, where Megatron has its losses. run.json is there before a model is built, so that a job that
dies of that says what it was; it is written anew when training begins, with what Megatron has completed since. A run that
is resumed in the same folder goes on in steps.jsonl. end.json is missing while a run goes on, and after a kill; the first
rank that fails says why.
A file that cannot be written is told in the log, and training goes on.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...console.errors import UserError
from ...console.files import append_line, write_whole
from ...console.version import __version__
from ..flags.batches import microbatches_now, shape_of
from ..flags.settings import settings_of
from ..seams import Seam
from . import metrics

FORMAT = "megatron_bfpp run 1"
BUILD = Seam("megatron.training.training", "setup_model_and_optimizer", ("model_type",))
DATA = Seam("megatron.training.training", "build_train_valid_test_data_iterators", ())
TRAIN = Seam("megatron.training.training", "train", ("forward_step_func", "model", "config"))
# Of the environment, what run.json keeps.
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
        """A step that has ended, on every rank."""
        self.steps = step
        if _writes():
            try:
                append_line(self.folder / "steps.jsonl", entry)
            except OSError as error:
                _warn(f"step {step} is missing in {self.folder / 'steps.jsonl'}: {error.strerror}")

    def end(self, reason: str | None = None) -> None:
        """Write end.json. reason: why the run has failed; None if it has not."""
        if reason is None:
            if _writes():
                self._write("end.json", {"status": "finished", "reason": None, "ended": _now(), "steps": self.steps})
        elif not (self.folder / "end.json").exists():  # the others fail because of the first one
            rank = f"rank {dist.get_rank()}: {reason}"
            self._write("end.json", {"status": "failed", "reason": rank, "ended": _now(), "steps": self.steps})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        try:
            write_whole(str(self.folder / name), json.dumps(content, indent=1, default=str) + "\n", "--bfpp-run-dir")
        except UserError as error:
            _warn(str(error))


def keeping(run: Run, get_args: Callable[[], Any]) -> dict[Seam, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """What replaces Megatron's functions so that the run's files begin, and end however the job ends."""

    def around(begins: bool, finishes: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def replace(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                if begins:
                    run.begin(get_args())
                with _ending(run):
                    answer = function(*args, **kwargs)
                if finishes:
                    run.end()
                return answer

            # Tools that look at the function see Megatron's signature.
            wrapper.__wrapped__ = function  # type: ignore[attr-defined]
            return wrapper

        return replace

    return {BUILD: around(True, False), DATA: around(False, False), TRAIN: around(True, True)}


@contextmanager
def _ending(run: Run) -> Iterator[None]:
    """An error that ends the job is told in end.json, and goes on."""
    try:
        yield
    except SystemExit as stop:  # Megatron's --exit-interval and --exit-duration-in-mins
        run.end(None if not stop.code else f"exit code {stop.code}")
        raise
    except BaseException as error:
        run.end(f"{type(error).__name__}: {error}")
        raise


def describe(args: Any, name: str, hosts: list[str]) -> dict[str, Any]:
    """run.json. args: Megatron's, validated."""
    from megatron.training.training import num_floating_point_operations

    settings, microbatches = settings_of(args), microbatches_now()
    shape = shape_of(args, microbatches)
    plan = None
    if shape is not None:
        is_ours = settings.schedule != "1f1b"
        digest = settings.plan_of(shape, is_sharded=getattr(args, "use_torch_fsdp2", False)).digest if is_ours else None
        plan = {"digest": digest, "bubble_fraction_predicted": metrics.predicted_bubble(args)}
    is_cuda = torch.cuda.is_available()
    return {
        "format": FORMAT,
        "name": os.environ.get("BFPP_RUN_NAME") or name,
        "arm": os.environ.get("BFPP_ARM") or arm_of(args, microbatches),
        "round": _round(),
        "pipeline_schedule": settings.schedule,
        "started": _now(),
        "args": json.loads(json.dumps(vars(args), default=str, sort_keys=True)),
        "environment": {
            key: value for key, value in sorted(os.environ.items()) if key in _NAMES or key.startswith(_PREFIXES)
        },
        "versions": _versions(is_cuda),
        "commits": {
            "megatron_bfpp": _commit(__file__), "megatron": _commit(inspect.getfile(num_floating_point_operations)),
        },
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
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


def arm_of(args: Any, microbatches: int) -> str:
    """The name of what runs, as `bfpp bench` has it."""
    settings = settings_of(args)
    if settings.schedule == "1f1b":
        if not args.virtual_pipeline_model_parallel_size:
            return "1f1b"
        group = getattr(args, "microbatch_group_size_per_vp_stage", None)
        is_grouped = group == microbatches > args.pipeline_model_parallel_size
        return "interleaved-grouped" if is_grouped else "interleaved"
    endings = (
        ("-late", settings.backward == "late"), ("-megatron", settings.engine == "megatron"),
        ("-sharded", getattr(args, "use_torch_fsdp2", False)),
    )  # fmt: skip
    return settings.schedule + "".join(ending for ending, applies in endings if applies)


def _round() -> int | None:
    """Which of the runs of its arm this is, from the A/B scripts: rounds are compared with each other."""
    value = os.environ.get("BFPP_ROUND", "")
    return int(value) if re.fullmatch(r"\d{1,6}", value, re.ASCII) else None


def _versions(is_cuda: bool) -> dict[str, str | None]:
    return {
        "megatron_bfpp": __version__,
        **{name: _version(name) for name in ("megatron-core", "torch", "transformer-engine")},
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,
    }


def _version(package: str) -> str | None:
    if package == "megatron-core":  # the one that is imported, which need not be the one that is installed
        from megatron.core.package_info import __version__ as version

        return version  # type: ignore[no-any-return]
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(file: str) -> str | None:
    """Short hash of the checkout that holds `file`; None for a file that git does not know, as of a package."""
    git = ["git", "-C", str(Path(file).parent)]
    try:
        for command in (["ls-files", "--error-unmatch", file], ["rev-parse", "--short", "HEAD"]):
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout
        return None
    return done.stdout.strip()


def _writes() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def _warn(text: str) -> None:
    print(f"megatron_bfpp {__version__}: WARNING: {text}", flush=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
