"""The rows of the trial: what each runs, and the function of judges.py that says what the outcome means."""

import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...compare.runs import read as read_run
from ...integration.flags.settings import Settings
from ...planner.flags import gpt_of, parse, strategy_of
from ...planner.memory import PRECISIONS, memory
from ...schedule import PipelineShape
from ...schedule.names import SCHEDULES
from ..jobs import DETERMINISTIC, PLAIN_LAYERS, TIMEOUT_S, Job, tiny
from ..line import FAIL, gpus, section
from ..table import judged
from ..trial import ARMS as EQUAL_ARMS
from ..trial import equality_job, verdict
from . import judges
from .judges import Verdict
from .kernels import read as read_kernels
from .place import JobFailed, Place
from .shapes import EQUAL_PP, QUIET_STEPS, ROUNDS, positions_of, turns_of

CONNECTIONS = (1, 8, 32)
OURS = list(SCHEDULES["breadth-first"].flags)
STEPS = 6  # of jobs whose times and memory count; the first ones warm up
# Seconds that an action may take in jobs that may hang, of which the first step compiles kernels.
HANGS_S = 60
KILL_AFTER, KILL_TIMEOUT_S = 3, 30.0  # steps; seconds


@dataclass(frozen=True)
class Row:
    """A row. gpus: the fewest that it needs. times: it judges times, which mean nothing where two ranks share a GPU."""

    title: str
    gpus: int
    run: Callable[[Place], dict[str, Any]]
    judge: Callable[[dict[str, Any]], Verdict]
    times: bool = False


def _machine(place: Place) -> dict[str, Any]:
    facts, topology = place.facts, ""
    if place.gpus > 1:
        words = ["nvidia-smi", "topo", "-m"]
        try:
            topology = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            topology = ""
    torch, devices = section(facts, "torch"), gpus(facts)
    versions = {"torch": torch.get("version"), "CUDA": torch.get("cuda") if devices else None,
                "NCCL": torch.get("nccl"), "megatron-core": section(facts, "megatron").get("version"),
                "Transformer Engine": section(facts, "te").get("version")}  # fmt: skip
    return {
        "failing": [line._asdict() for line in judged(facts) if line.status == FAIL],
        "gpus": [device["name"] for device in devices],
        "capability": min((device["capability"] for device in devices), default=None),
        "versions": versions,
        "links": judges.links_of(topology),
        "connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
        "launch_blocking": os.environ.get("CUDA_LAUNCH_BLOCKING"),
    }


def _equality(place: Place) -> dict[str, Any]:
    data = {}
    for pp in EQUAL_PP:
        if pp <= place.ranks:
            folder = place.folder / f"{pp}x2"
            folder.mkdir()
            jobs = [
                replace(equality_job(arm, flags, pp, 2 * pp, place.device, folder), shares_card=place.shares_card)
                for arm, flags in EQUAL_ARMS.items()
            ]
            place.train(*jobs)
            data[folder.name] = verdict(*(read_run(job.run_folder) for job in jobs))
    return data


def _features(place: Place) -> dict[str, Any]:
    dp = 2 if place.ranks >= 4 else 1
    words = [*tiny(2, 2, 8 * dp, STEPS), *place.layers(), "--bf16", "--untie-embeddings-and-output-weights"]
    words += ["--hidden-size", "256", "--seq-length", "128", "--max-position-embeddings", "128", "--lr", "1e-3"]
    zero1 = ["--recompute-activations", "--use-distributed-optimizer"]
    zero1 += ["--overlap-grad-reduce", "--overlap-param-gather"] if dp > 1 else []
    flags = {"interleaved": zero1, "breadth-first": [*zero1, *OURS]}
    if dp > 1:
        flags["fully sharded"] = ["--recompute-activations", *SCHEDULES["breadth-first-sharded"].flags]
    jobs = {name: place.job(f"bf16-{name.replace(' ', '-')}", 2 * dp, [*words, *more]) for name, more in flags.items()}
    ended = place.run([replace(job, environment=job.environment | DETERMINISTIC) for job in jobs.values()])
    data: dict[str, Any] = {"left_out": "" if dp > 1 else "FSDP2 and the overlaps of ZeRO-1 need 4 GPUs"}
    for (name, job), each in zip(jobs.items(), ended):
        if name == "fully sharded" and set(each.codes) == {2}:  # its torch is too old
            data["left_out"] = f"FSDP2 not judged: {each.said}"
        elif each.failure:
            raise JobFailed(each.failure)
        else:
            data[name] = [float(step.values.get("lm loss", math.nan)) for step in read_run(job.run_folder).steps]
    return data


def _tiny(place: Place, pp: int, microbatches: int, steps: int, timeout_s: float = HANGS_S) -> list[str]:
    words = [*tiny(pp, 2, microbatches, steps), *(PLAIN_LAYERS if place.gpus else []), *OURS]
    return [*words, "--bfpp-timeout-seconds", f"{timeout_s:g}"]


def _switches(place: Place) -> dict[str, Any]:
    switches: dict[str, tuple[list[str], str]] = {
        "debug-p2p": (["--bfpp-debug-p2p"], ""), "timers": (["--timing-log-level", "2"], ""),
        "variable-shapes": ([], "variable"),
    }  # fmt: skip
    jobs = {
        f"{name} at {connections}": place.job(
            f"{name}-{connections}", 2, [*_tiny(place, 2, 8, 4), *flags], connections, observers
        )
        for name, (flags, observers) in switches.items()
        for connections in CONNECTIONS
    }
    ended = place.run(list(jobs.values()))
    return {name: {"codes": each.codes, "said": each.said, "seconds": each.seconds} for name, each in zip(jobs, ended)}


def _walk(place: Place) -> dict[str, Any]:
    data = {}
    for connections in (1, 32):
        job = walk_job(place, connections)
        (ended,) = place.run([job])
        file = job.run_folder / "walk.jsonl"
        begun = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        last = begun[-1] if begun else {"pp_rank": "-", "position": "-", "positions": 0}
        data[str(connections)] = {
            "positions": last["positions"], "passed": max(0, job.steps() - QUIET_STEPS), "failure": ended.failure,
            "last": f"{last['position']} of pp_rank {last['pp_rank']}",
        }  # fmt: skip
    return data


def walk_job(place: Place, connections: int) -> Job:
    """Return the job whose every step waits for the device elsewhere, with a step for each action of its plan."""
    pp = 4 if place.ranks >= 4 else 2
    plan = Settings(schedule="breadth-first").plan_of(PipelineShape(pp, 2, 4)).actions
    words = _tiny(place, pp, 4, QUIET_STEPS + len(positions_of(plan)))
    return place.job(f"walk-{connections}", pp, words, connections, "walk")


def _ratios(place: Place) -> dict[str, Any]:
    pp = max(size for size in (2, 4, 8) if size <= place.ranks)
    jobs, steps = [], []
    for connections in (1, 32):
        for chunks in (1, 2):
            words = place.large(pp, 1, chunks, 4 * pp, ROUNDS * len(turns_of(chunks, pp)))
            words += ["--overlap-p2p-communication-warmup-flush", *OURS] if chunks > 1 else []
            jobs.append(place.job(f"times-{chunks}-{connections}", pp, words, connections, "arms"))
            place.train(jobs[-1])
            seconds = {step.number: step.time_s for step in read_run(jobs[-1].run_folder).steps}
            for line in (jobs[-1].run_folder / "arms.jsonl").read_text().splitlines():
                step = json.loads(line)
                steps.append({**step, "connections": connections, "seconds": seconds.get(step["step"])})
    return {"pp": pp, "connections": [1, 32], "steps": steps}


def observed(place: Place, factor: int, observers: str = "observe") -> dict[str, Any]:
    """Train with factor x P micro-batches under observers; return what each rank saw. A job runs once for all rows."""
    pp, dp = 4 if place.ranks >= 8 else 2, 2 if place.ranks >= 4 else 1
    name = f"{observers.replace(',', '-')}-{factor}"
    if name not in place.kept:
        words = [*place.large(pp, dp, 2, factor * pp, STEPS), *OURS]
        job = place.job(name, pp * dp, words, observers=observers)
        place.train(job)
        ranks = [json.loads((job.run_folder / f"rank{rank}.json").read_text()) for rank in range(job.ranks)]
        for rank, found in enumerate(ranks):
            found["kernels"] = read_kernels(job.run_folder / f"rank{rank}.trace.json")
        place.kept[name] = {"words": words, "shape": (pp, 2, factor * pp), "dp": dp, "ranks": ranks}
    return place.kept[name]  # type: ignore[no-any-return]


def _kernels(place: Place) -> dict[str, Any]:
    loud, quiet = (observed(place, 4, observers) for observers in ("observe", "silent,observe"))
    return {"shape": loud["shape"], "dp": loud["dp"], "kernels": [rank["kernels"] for rank in loud["ranks"]],
            "quiet": [rank["kernels"] for rank in quiet["ranks"]]}  # fmt: skip


def _memory(place: Place) -> dict[str, Any]:
    job = observed(place, 4)
    args = parse(job["words"])
    gpt, strategy = gpt_of(args), strategy_of(args, len(job["ranks"]))
    kept = ("pp_rank", "peak_bytes", "alive", "messages", "chunks")
    return {"ranks": [
        {name: rank[name] for name in kept}
        | {"predicted_bytes": memory(gpt, strategy, PRECISIONS["bf16"], place.has_te, rank["pp_rank"]).total}
        for rank in job["ranks"]
    ]}  # fmt: skip


def _killed(place: Place) -> dict[str, Any]:
    recorder = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_FR_BUFFER_SIZE": "2000",
                "TORCH_FR_DUMP_TEMP_FILE": str(place.folder / "flight_recorder_")}  # fmt: skip
    job = place.job("killed", 2, _tiny(place, 2, 8, 100_000, KILL_TIMEOUT_S))
    job = replace(job, environment=job.environment | recorder)
    with job.start() as ranks:
        deadline = time.monotonic() + TIMEOUT_S
        while job.steps() < KILL_AFTER and time.monotonic() < deadline and ranks.codes() == [None, None]:
            place.on_wait()
            time.sleep(0.1)
        codes = ranks.codes()
        if job.steps() < KILL_AFTER or codes != [None, None]:
            raise JobFailed(job.failure(codes) or f"{job.name} has ended before its kill")
        ranks.kill(1)
        killed = time.monotonic()
        codes = ranks.wait(KILL_TIMEOUT_S + judges.MARGIN_S, float("inf"), place.on_wait)
        seconds = time.monotonic() - killed
    dumps = sum(1 for file in place.folder.glob("flight_recorder_*") if file.stat().st_size)
    return {"codes": codes, "seconds": seconds, "timeout_s": KILL_TIMEOUT_S, "dumps": dumps, "device": place.device}


ROWS = (
    Row("versions, connections, topology", 0, _machine, judges.machine),
    Row("fp32 has the bits of Megatron's default", 0, _equality, judges.equality),
    Row("bf16, TE, recomputation, ZeRO-1, FSDP2", 1, _features, judges.features),
    Row("debug-p2p, timers, variable shapes", 1, _switches, judges.endings),
    Row("a device-wide wait before each action", 1, _walk, judges.walk),
    Row("step times", 2, _ratios, judges.ratios, times=True),
    Row("messages and reductions run beside", 2, _kernels, judges.kernels, times=True),
    Row("the host's time", 2, lambda place: observed(place, 1), judges.host, times=True),
    Row("memory and messages", 1, _memory, judges.memory),
    Row("a killed rank", 0, _killed, judges.killed),
)
