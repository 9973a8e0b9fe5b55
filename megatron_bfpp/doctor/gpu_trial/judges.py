"""What each row of the trial says of the data that its jobs have left. Pure functions; standard library only."""

import math
import re
from collections import defaultdict
from statistics import median
from typing import Any, NamedTuple

from ...compare.losses import relative
from ...schedule import PipelineShape
from . import overlap
from .kernels import COMPUTE, Kernel
from .shapes import ARMS, COUNTED, EQUAL_PP

# bf16 has 8 bits: what another order of the same sums may move in a loss after a few steps.
MOST_LOSS = {"breadth-first": 1e-3, "fully sharded": 1e-2}
MOST_OF_GROUPED = 1.02  # the step time of breadth-first in that of Megatron's loop with one group, at M >= 2 P
MOST_HOST = 0.7  # the host's part of the GPU's time: above it the GPU waits for launches where the host is disturbed
MOST_OFF_PLAN = 0.05  # of the memory that the plan predicts
MARGIN_S = 15.0  # beyond --bfpp-timeout-seconds, for the reports, the dump and the end of a process


class Verdict(NamedTuple):
    """What is wrong, nothing if all is well; and the figures."""

    wrong: list[str]
    figures: str


def machine(data: dict[str, Any]) -> Verdict:
    """Judge versions, connections and topology."""
    wrong = [f"{each['name']}: {each['found']}" for each in data["failing"]]
    if data["launch_blocking"] not in (None, "", "0"):
        wrong.append(f"CUDA_LAUNCH_BLOCKING={data['launch_blocking']}: unset it, the host would wait for ever")
    names, capability = sorted(set(data["gpus"])), data["capability"]
    if len(names) > 1:
        wrong.append(
            f"the GPUs are of {len(names)} kinds, {', '.join(names)}: CUDA_VISIBLE_DEVICES chooses those of one"
        )
    if capability is not None and capability[0] < 8:
        wrong.append(f"compute capability {capability[0]}.{capability[1]}: bf16 needs 8.0")
    figures = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if version)
    if not names:
        return Verdict(wrong, f"{figures}; no GPU")
    links = f", joined by {', '.join(data['links'])}" if data["links"] else ""
    connections = f"CUDA_DEVICE_MAX_CONNECTIONS {data['connections'] or 'not set'}"
    return Verdict(wrong, f"{len(data['gpus'])} x {names[0]}{links}; {figures}; {connections}")


def links_of(topology: str) -> list[str]:
    """Return how the GPUs are joined, from the table that `nvidia-smi topo -m` prints: NV18, NODE, SYS ..."""
    rows = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()]
    gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and len(row) > 1 and "X" in row[1:]]
    return sorted({cell for row in gpus for cell in row[1 : len(gpus) + 1]} - {"X"})


def equality(data: dict[str, str]) -> Verdict:
    """Judge the bits of fp32. data: shape -> what differs, or ""; shapes that need more GPUs are missing."""
    left = ", ".join(f"{pp}x2 ({pp} GPUs)" for pp in EQUAL_PP if f"{pp}x2" not in data)
    figures = f"{', '.join(data)}: the same bits" + (f"; not run: {left}" if left else "")
    return Verdict([f"{shape}: {why}" for shape, why in data.items() if why], figures)


def features(data: dict[str, Any]) -> Verdict:
    """Judge losses in bf16 against those of interleaved. data: name -> losses of all steps; left_out: what and why."""
    wrong, figures = [], [data["left_out"]] if data["left_out"] else []
    reference = data["interleaved"]
    for name, most in MOST_LOSS.items():
        if name in data:
            losses = data[name]
            if not losses or len(losses) != len(reference) or not all(map(math.isfinite, losses)):
                wrong.append(f"{name} has the losses {losses}, interleaved {reference}")
                continue
            off = max(map(relative, losses, reference))
            figures.append(f"{name} differs by {off:.1e}" if off else f"{name}: the same losses")
            if off > most:
                wrong.append(f"{name}: losses differ by {off:.1e} of interleaved's, at most {most:g} allowed")
    return Verdict(wrong, ", ".join(figures))


def endings(data: dict[str, dict[str, Any]]) -> Verdict:
    """Judge that each job ends, or is refused. data: name -> codes of its ranks, the first error, seconds."""
    wrong, ended, refused = [], 0, set()
    for name, job in data.items():
        codes, said = job["codes"], job["said"]
        if all(code == 0 for code in codes):
            ended += 1
        elif codes and set(codes) == {2} and said.startswith("megatron_bfpp: error:"):
            refused.add(f"{name.partition(' at ')[0]} refused: {said.removeprefix('megatron_bfpp: error:').strip()}")
        else:
            how = "did not end" if None in codes else f"ended with {codes}"
            wrong.append(f"{name} {how} after {job['seconds']:.0f} s: {said}")
    return Verdict(wrong, "; ".join([f"{ended} of {len(data)} jobs ended well", *sorted(refused)]))


def walk(data: dict[str, dict[str, Any]]) -> Verdict:
    """Judge the waits for the whole device. data: connections -> positions, those passed, the last one, the failure."""
    wrong = []
    for connections, job in data.items():
        if job["failure"] or job["passed"] < job["positions"] or not job["positions"]:
            passed = f"{job['passed']} of {job['positions']} waits passed, the last begun before action {job['last']}"
            wrong.append(f"connections {connections}: {passed}: {job['failure']}")
    counts = ", ".join(f"{job['passed']} with {connections} connection(s)" for connections, job in data.items())
    return Verdict(wrong, f"waits passed: {counts}")


def ratios(data: dict[str, Any]) -> Verdict:
    """Judge step times. data: pp; steps, each with connections, arm, microbatches and seconds, in their order."""
    times: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for step in data["steps"]:
        if step["seconds"] is not None:
            times[step["connections"], step["arm"], step["microbatches"]].append(step["seconds"])
    wrong, figures = [], []
    for connections in data["connections"]:
        for factor in (1, 2, 4):
            count = factor * data["pp"]
            found = {
                arm: median(times[connections, arm, count][-COUNTED:]) for arm in ARMS if times[connections, arm, count]
            }
            where = f"M {count}, connections {connections}"
            if len(found) < len(ARMS):
                wrong.append(f"{where}: only {', '.join(found) or 'nothing'} was measured")
                continue
            grouped = found.pop("interleaved-grouped")
            parts = {arm: seconds / grouped for arm, seconds in found.items()}
            figures.append(f"{where}: " + " ".join(f"{arm} {part:.3f}" for arm, part in parts.items()))
            if factor > 1 and parts["breadth-first"] > MOST_OF_GROUPED:
                wrong.append(f"{where}: breadth-first takes {parts['breadth-first']:.3f} x grouped")
    return Verdict(wrong, "; ".join(["x interleaved-grouped", *figures]))


def kernels(data: dict[str, Any]) -> Verdict:
    """Judge the profiled step. data: shape, dp, and the kernels of each rank with and without messages."""
    shape = PipelineShape(*data["shape"])
    wrong, figures = [], []
    for rank, (loud, quiet) in enumerate(zip(data["kernels"], data["quiet"], strict=True)):
        with_messages, without = ([Kernel(*each) for each in some] for some in (loud, quiet))
        faults, found = overlap.judge_rank(with_messages, without, shape, data["dp"] > 1)
        wrong += [f"rank {rank}: {fault}" for fault in faults]
        figures += [found] if found else []
    worst = {name: max(each[name] for each in figures) for name in ("blocked", "gemm") if figures}
    worst |= {name: min(each[name] for each in figures) for name in ("send", "receive") if figures}
    text = "no kernels"
    if worst:
        text = f"{worst['send']:.0%} of sends and {worst['receive']:.0%} of receives beside computation, "
        text += f"{worst['blocked']:.1%} of a step behind pending receives, "
        text += f"products {worst['gemm']:.3f} x of those without messages"
    return Verdict(wrong, text + ("" if data["dp"] > 1 else "; reductions not judged: they need 4 GPUs"))


def host(data: dict[str, Any]) -> Verdict:
    """Judge the host's time. data: ranks, each with seconds of the host in a step, its actions and its kernels."""
    wrong, parts, each_us = [], [], []
    for rank, found in enumerate(data["ranks"]):
        seconds = sum(end - start for kind, _, _, start, end in found["kernels"] if kind in COMPUTE) * 1e-6
        if not seconds:
            wrong.append(f"rank {rank}: its trace has no kernels")
            continue
        parts.append(found["host_s"] / seconds)
        each_us.append(found["host_s"] / found["actions"] * 1e6)
        if parts[-1] > MOST_HOST:
            wrong.append(f"rank {rank}: the host takes {parts[-1]:.2f} of the GPU's time, at most {MOST_HOST} allowed")
    if not parts:
        return Verdict(wrong, "")
    return Verdict(wrong, f"{max(each_us):.0f} us of the host per action, {max(parts):.2f} of the GPU's time")


def memory(data: dict[str, Any]) -> Verdict:
    """Judge peaks and messages. data: ranks, each with predicted and measured bytes, chunks, and messages alive.

    The layers of a chunk hold their last input and its gradient, in Megatron, until the next one comes.
    """
    wrong, figures = [], []
    for rank, found in enumerate(data["ranks"]):
        off = found["peak_bytes"] / found["predicted_bytes"] - 1
        figures.append(f"{found['peak_bytes'] / 2**30:.2f} GiB ({off:+.1%})")
        if abs(off) > MOST_OFF_PLAN:
            wrong.append(f"rank {rank}: {figures[-1]} against {found['predicted_bytes'] / 2**30:.2f} of the plan")
        if found["alive"] > 2 * found["chunks"] or not found["messages"]:
            wrong.append(f"rank {rank}: {found['alive']} of {found['messages']} messages outlive the step")
    return Verdict(wrong, f"peaks {', '.join(figures)}; no message but the last of each chunk outlives the step")


def killed(data: dict[str, Any]) -> Verdict:
    """Judge the end of a job, one rank of which was killed. data: codes, seconds until all had ended, dumps."""
    wrong = []
    most = data["timeout_s"] + MARGIN_S
    if None in data["codes"] or data["seconds"] > most:
        left = [rank for rank, code in enumerate(data["codes"]) if code is None]
        wrong.append(f"{most:.0f} s after the kill ranks {left} still run")
    elif 0 in data["codes"]:
        wrong.append(f"the ranks ended with {data['codes']}: a rank whose peer was killed must fail")
    if data["device"] == "cuda" and not data["dumps"]:
        wrong.append("no rank has left NCCL's flight recorder")
    dumps = f"{data['dumps']} dump(s)" if data["device"] == "cuda" else "dumps need NCCL"
    return Verdict(wrong, f"all had ended after {data['seconds']:.1f} s of {most:.0f} s; {dumps}")
