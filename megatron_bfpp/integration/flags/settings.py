"""The choices of a job: the flags, their defaults, and their values on a command line. No import of Megatron."""

import argparse
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from ...console.errors import UserError
from ...schedule import PipelineShape
from ...schedule.costs import EQUAL, Times, times_of
from ...schedule.lower import DEFAULT_HOP
from ...schedule.names import word_of
from ...schedule.plan import LEAST_GAIN, Plan, lags_for, plan_of

SCHEDULES = ("1f1b", "breadth-first")
VARIABLE = "BFPP_PIPELINE_SCHEDULE"  # of the environment, where nothing else names the schedule
TIMEOUT_VARIABLE = "BFPP_TIMEOUT_SECONDS"  # as --bfpp-timeout-seconds
BACKWARDS = ("eager", "late")
ENGINES = ("plan", "megatron")
WEIGHT_GRADIENTS = ("with-backward", "deferred", "auto")
PART_OF_MEGATRONS = 0.8  # of --distributed-timeout-minutes: the watchdog reports before NCCL ends the process
MOST_TRACED_STEPS = 50  # their notes are kept until the last of them
RESIDENT_CHUNKS = 2  # the fewest with which the gather of a chunk hides behind the chunk before it

_FLAGS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("--breadth-first-backward", {"default": "eager", "metavar": "{eager,late}"},
     "eager: backwards of the last chunk start as soon as they can; fewer live activations at the same step time. "
     "late: after all forwards, the paper's plain order."),
    ("--breadth-first-group-size", {"type": int, "metavar": "N"},
     "Run the micro-batches in groups of N: less memory, less overlap. Default: all micro-batches of the step."),
    ("--breadth-first-engine", {"default": "plan", "metavar": "{plan,megatron}"},
     "plan: the plugin's executor of a checked plan. megatron: Megatron's own loop in breadth-first order."),
    ("--breadth-first-resident-chunks", {"type": int, "metavar": "N"},
     "With --use-torch-fsdp2: how many model chunks of a rank may hold gathered parameters at one time. More take "
     f"memory and save gathers; all is ZeRO-2. Default: {RESIDENT_CHUNKS}."),
    ("--breadth-first-weight-gradients", {"default": "with-backward", "metavar": "{with-backward,deferred,auto}"},
     "deferred: split each backward. The input's gradient is computed and sent first, the weights' gradients wait, and "
     "fill the end of the step: the bubble falls to a third, for the memory of what they need. Same bits. auto: "
     f"deferred where a simulation, with times estimated from the model's sizes, gains {LEAST_GAIN:.0%} or more."),
    ("--breadth-first-weight-lag", {"type": int, "metavar": "K"},
     "With deferred weight gradients: the most micro-batches whose weights' gradients wait on a rank, beside the one "
     "that has just run. Less takes less memory and hides less. Default: r or a few more on pipeline rank r, whatever "
     "gives the shortest step in a simulation."),
    ("--breadth-first-hop", {"type": float, "metavar": "C"},
     "The time of a message between two ranks, in forwards of one micro-batch through one chunk, for which receives "
     "are posted ahead. It matters where CUDA_DEVICE_MAX_CONNECTIONS is 1: as long as your messages or longer. "
     f"Default: {DEFAULT_HOP}."),
    ("--bfpp-timeout-seconds", {"type": float, "metavar": "S"},
     "Breadth-first: end the job on all ranks if an action of a step, or a wait in it, takes longer; each rank then "
     "reports what it was doing. 0: never. Default: 0.8 of --distributed-timeout-minutes."),
    ("--bfpp-debug-p2p", {"action": "store_true"},
     "Breadth-first: send with each message which one it is; a receiver that waits for another one ends the job and "
     "names both. Their headers travel over one gloo group."),
    ("--bfpp-log-communication", {"action": "store_true"},
     "Log the collectives and messages of each step with their bytes, under either schedule: one line per log "
     "interval, and bfpp/... in TensorBoard and W&B."),
    ("--bfpp-run-dir", {"metavar": "DIR"},
     "Write the files of the run there, under either schedule: run.json, steps.jsonl, end.json, and a trace. "
     "Default: the environment variable BFPP_RUN_DIR."),
    ("--bfpp-trace-steps", {"metavar": "A-B"},
     "Record when every forward, backward and message of these steps runs, on all pipeline ranks of the first "
     "replica: a Chrome trace, in the run's folder or in ./bfpp-trace.json. One number for one step."),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The choice for one job; the defaults are those of the flags."""

    schedule: str = "1f1b"
    backward: str = "eager"
    group_size: int | None = None  # microbatches per group; None for all of a step
    engine: str = "plan"
    resident_chunks: int | None = None  # gathered at one time, with fully sharded parameters; None for the default
    hop: float = DEFAULT_HOP  # latency of a message in forwards of a micro-batch through a chunk, see schedule/lower.py
    weight_gradients: str = "with-backward"
    weight_lag: int | None = None  # the most micro-batches that await their weights' gradients; None for no limit
    times: Times = EQUAL  # of F, I and W, by which lags are chosen and `auto` decides
    debug_p2p: bool = False  # each message says what it is, and the receiver compares

    def __post_init__(self) -> None:
        for flag, value, choices in (
            ("--pipeline-schedule", self.schedule, SCHEDULES),
            ("--breadth-first-backward", self.backward, BACKWARDS),
            ("--breadth-first-engine", self.engine, ENGINES),
            ("--breadth-first-weight-gradients", self.weight_gradients, WEIGHT_GRADIENTS),
        ):
            if value not in choices:
                raise UserError(f"{flag} {value} does not exist.\n  Use {flag} {' or '.join(choices)}.")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(
                f"--breadth-first-group-size is {self.group_size}; it counts micro-batches.\n"
                "  Use 1 or more, for a full pipeline the number of pipeline ranks or more, or leave it out for all."
            )
        if self.resident_chunks is not None and self.resident_chunks < 1:
            raise UserError(
                f"--breadth-first-resident-chunks is {self.resident_chunks}; a chunk runs only while it is gathered.\n"
                f"  Use {RESIDENT_CHUNKS}, which hides the gathers, or the number of chunks: one gather each per step."
            )
        if self.schedule == "1f1b" and self.weight_gradients != "with-backward":
            raise UserError(
                f"--breadth-first-weight-gradients {self.weight_gradients} splits backwards, but 1f1b has whole ones.\n"
                "  Use --pipeline-schedule breadth-first, or leave it out."
            )
        if self.weight_lag is not None and self.weight_lag < 0:
            raise UserError(
                f"--breadth-first-weight-lag is {self.weight_lag}; it counts micro-batches.\n"
                "  Use 0 or more, or leave it out: r or a few more then wait on pipeline rank r."
            )
        if self.weight_lag is not None and self.weight_gradients == "with-backward":
            raise UserError(
                f"--breadth-first-weight-lag is {self.weight_lag}, but weights' gradients are computed "
                f"{self.weight_gradients}.\n  Use it with --breadth-first-weight-gradients deferred, or leave it out."
            )
        if not 0 <= self.hop < math.inf:
            raise UserError(
                f"--breadth-first-hop is {self.hop}; it is the time of a message over that of a forward.\n"
                f"  Use 0 or more, or leave it out for {DEFAULT_HOP}."
            )

    def plan_of(
        self, shape: PipelineShape, evaluation: bool = False, is_sharded: bool = False, is_ahead: bool = True
    ) -> Plan:
        """Return the checked plan that engine `plan` runs for a step of this shape.

        is_ahead: receives are posted ahead of their messages. Not where a rank has to wait for the sizes of a message
            before it posts the receive, and not in the first step on a GPU: it loads kernels, and all ranks may wait
            for their devices at one time. See `add_send_recv`.
        """
        resident = self.resident_chunks_of(shape.num_chunks) if is_sharded else None
        hop = self.hop if is_ahead else None
        lags = self.weight_lags_of(shape)[0] if not evaluation else None
        return plan_of(shape, self.group_size, self.backward == "eager", evaluation, resident, hop, lags)

    def weight_lags_of(self, shape: PipelineShape) -> tuple[tuple[int, ...] | None, float]:
        """Return how many micro-batches await their W on each rank, None for whole backwards, and what a split gains.

        The gain is the part of a step that a simulation saves; `auto` splits from LEAST_GAIN on.
        """
        order = shape, self.group_size, self.backward == "eager"
        return lags_for(self.weight_gradients, *order, self.weight_lag, self.hop, self.times)

    def resident_chunks_of(self, chunks: int) -> int:
        """Return how many chunks of a rank may be gathered at one time, with fully sharded parameters."""
        return min(self.resident_chunks or RESIDENT_CHUNKS, chunks)


def add_flags(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add the plugin's flags, once. Settings checks the values: argparse would answer with Megatron's whole usage."""
    if "--pipeline-schedule" in parser._option_string_actions:  # the parser of a patched fork, see patches/
        return
    group = parser.add_argument_group("breadth-first pipeline parallelism (megatron_bfpp)")
    group.add_argument(
        "--pipeline-schedule", default=default, metavar="{1f1b,breadth-first}",
        help="1f1b is Megatron's own schedule, untouched. breadth-first runs all micro-batches of a model chunk before "
        "the next chunk (Lamy-Poirier, arXiv 2211.05953).",
    )  # fmt: skip
    for flag, options, text in _FLAGS:
        group.add_argument(flag, help=text, **options)


def schedule_in_environment() -> str | None:
    """Return the schedule that the environment names, None if it names none; UserError for one that does not exist."""
    value = os.environ.get(VARIABLE) or None
    if value is not None and value not in SCHEDULES:
        raise UserError(f"{VARIABLE}={value} does not exist.\n  Use {VARIABLE}={' or '.join(SCHEDULES)}.")
    return value


def settings_of(args: Any, schedule: str | None = None) -> Settings:
    """Return the choice on a parsed command line, or in whatever holds some of the names; None holds none.

    schedule: counts more than the command line. The environment counts where neither names a schedule.
    """
    weight_gradients = getattr(args, "breadth_first_weight_gradients", None) or "with-backward"
    return Settings(
        schedule=schedule or getattr(args, "pipeline_schedule", None) or schedule_in_environment() or "1f1b",
        backward=getattr(args, "breadth_first_backward", None) or "eager",
        group_size=getattr(args, "breadth_first_group_size", None),
        engine=getattr(args, "breadth_first_engine", None) or "plan",
        resident_chunks=getattr(args, "breadth_first_resident_chunks", None),
        hop=DEFAULT_HOP if (hop := getattr(args, "breadth_first_hop", None)) is None else hop,
        weight_gradients=weight_gradients,
        weight_lag=getattr(args, "breadth_first_weight_lag", None),
        times=EQUAL if weight_gradients == "with-backward" else times_of(args),
        debug_p2p=bool(getattr(args, "bfpp_debug_p2p", False)),
    )


def is_sharded(args: Any) -> bool:
    """Return whether the job asks for fully sharded parameters, torch's FSDP2."""
    return bool(getattr(args, "use_torch_fsdp2", False))


def word_of_job(args: Any, num_microbatches: int) -> str:
    """Return the word for the schedule of a job whose steps have so many micro-batches; validated arguments."""
    settings, chunks = settings_of(args), args.virtual_pipeline_model_parallel_size or 1
    group = getattr(args, "microbatch_group_size_per_vp_stage", None)
    weight_gradients = settings.weight_gradients
    if weight_gradients == "auto":
        shape = PipelineShape(args.pipeline_model_parallel_size, chunks, num_microbatches)
        weight_gradients = "with-backward" if settings.weight_lags_of(shape)[0] is None else "deferred"
    return word_of(
        settings.schedule, args.pipeline_model_parallel_size, chunks, num_microbatches, group,
        backward=settings.backward, engine=settings.engine, weight_gradients=weight_gradients,
        is_sharded=is_sharded(args),
    )  # fmt: skip


def run_dir_of(args: Any) -> str | None:
    """Return the folder of the run's files: the flag's, or the environment's."""
    return getattr(args, "bfpp_run_dir", None) or os.environ.get("BFPP_RUN_DIR") or None


def trace_steps_of(args: Any) -> tuple[int, int] | None:
    """Return first and last of the steps to trace, counted from 1 as in the log; UserError if they cannot be."""
    text = getattr(args, "bfpp_trace_steps", None)
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", str(text).strip(), re.ASCII)
    if match is None:
        raise UserError(f"--bfpp-trace-steps {text} names no steps.\n  Use one number, or first and last: 20-22.")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise UserError(f"--bfpp-trace-steps {text}: steps count from 1, first the smaller.\n  Use for example 20-22.")
    if last - first >= MOST_TRACED_STEPS:
        raise UserError(
            f"--bfpp-trace-steps {text} are {last - first + 1} steps.\n"
            f"  Use at most {MOST_TRACED_STEPS}; three are enough for a picture."
        )
    return first, last


def timeout_minutes(args: Any) -> float:
    """Return --distributed-timeout-minutes; Megatron's default where a YAML file leaves it out."""
    return getattr(args, "distributed_timeout_minutes", None) or 10


def timeout_of(args: Any) -> float:
    """Return the seconds that an action of a step may take; 0 for no watchdog. UserError for what cannot be one.

    args: None without Megatron's command line. There is a watchdog then where the environment names its time.
    """
    given, name = getattr(args, "bfpp_timeout_seconds", None), "--bfpp-timeout-seconds"
    if given is None:
        given, name = os.environ.get(TIMEOUT_VARIABLE) or None, TIMEOUT_VARIABLE
    if given is None:
        if args is None:
            return 0.0
        limits = [60.0 * timeout_minutes(args), getattr(args, "distributed_timeout_seconds_after_init", None)]
        return PART_OF_MEGATRONS * min(limit for limit in limits if limit)
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf") or 0 < seconds < 1:
        raise UserError(
            f"{name} is {given}; it is the time that an action of a step may take, in seconds.\n"
            "  Use 1 or more, well above the longest step; or 0 for no watchdog."
        )
    return seconds
