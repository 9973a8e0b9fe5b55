"""Measured steps beside the planner's estimates: `bfpp plan FILE --rows`, and the fit of a profile to half of them.

FILE has `rows`: each with the flags of its job (`common`, those of its `model`, its own `flags`, and one of `choices`
where the source does not say which), its `gpu` and `gpus`, and what was measured: step_s, tokens_per_s_per_gpu or
tflops_per_gpu. docs/evidence/published.yaml is one.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import yaml

from ..console.errors import UserError
from .flags import gpt_of, parse, precision_of, strategy_of
from .hardware import GPU, load_gpu
from .model import GPT
from .search import Estimate, Request, estimate
from .strategy import Strategy

__all__ = ["FITTED", "Compared", "Row", "compare", "fit", "fitted", "read_rows", "summary", "table"]

_MEASURES = ("step_s", "tokens_per_s_per_gpu", "tflops_per_gpu")
_KEYS = {"name", "family", "gpu", "gpus", "model", "flags", "choices", "source", "assumed", "attention", "kernels"}
FITTED = ("matmul", "matmul_fp8", "attention", "experts_s")  # of a GPU
_LEAST_TO_FIT = 8  # rows of a kind of GPU; of fewer all judge


class Case(NamedTuple):
    """One way to run a row's job."""

    request: Request
    strategy: Strategy


@dataclass(frozen=True)
class Row:
    """A measured step, with the ways to run it among which the source leaves the choice."""

    name: str
    family: str
    gpu: str
    gpus: int
    cases: tuple[Case, ...]
    measured_s: float
    is_judge: bool
    is_assumed: bool  # the source leaves something open

    def estimate(self, gpu: Callable[[GPU], GPU] = lambda gpu: gpu) -> Estimate:
        """Predict the step by the formula; the fastest of the cases that fit into memory. gpu: changes the profile."""
        found = [estimate(replace(request, gpu=gpu(request.gpu)), strategy, False) for request, strategy in self.cases]
        fits = [each for each in found if each.memory.total < self.cases[0].request.gpu.memory]
        return min(fits or found, key=lambda each: each.step.step)


class Compared(NamedTuple):
    """A row with its estimate."""

    row: Row
    estimate: Estimate

    @property
    def error(self) -> float:
        """The part by which the estimate is longer than what was measured; negative where it is shorter."""
        return self.estimate.step.step / self.row.measured_s - 1


def read_rows(path: str) -> list[Row]:
    """Read the rows of a file, sorted by GPU, family and name. Raises UserError where one cannot be planned."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        given = sorted(content["rows"], key=lambda row: (row["gpu"], row["family"], row["name"]))
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path} has no rows to compare: {error!r}.\n"
                        "  It needs `rows`, each with name, family, gpu, gpus and flags.") from None  # fmt: skip
    kinds = [row["gpu"] for row in given]
    rows: list[Row] = []
    for (kind, _), family in groupby(given, key=lambda row: (row["gpu"], row["family"])):
        is_fitted = kinds.count(kind) >= _LEAST_TO_FIT
        for place, row in enumerate(family):
            rows.append(_row(path, content, row, not is_fitted or place % 2 == 1))
    return rows


def _row(path: str, content: dict[str, Any], row: dict[str, Any], is_judge: bool) -> Row:
    where = f"{path}: row {row['name']}"
    unknown = set(row) - _KEYS - set(_MEASURES)
    if unknown or len(set(row) & set(_MEASURES)) != 1:
        raise UserError(f"{where} has {', '.join(sorted(unknown)) or 'not one measured figure'}.\n"
                        f"  It takes {', '.join(sorted(_KEYS))}, and one of {', '.join(_MEASURES)}.")  # fmt: skip
    words = " ".join([content.get("common", ""), content.get("models", {}).get(row.get("model"), ""), row["flags"]])
    cases = []
    for choice in row.get("choices", [""]):
        args = parse(shlex.split(f"{words} {choice}"))
        gpu, strategy = load_gpu(row["gpu"]), strategy_of(args, row["gpus"])
        if row.get("kernels") == "2020":  # before flash attention and sequence parallelism
            gpu, strategy = replace(gpu, flash_attention=False), replace(strategy, sequence_parallel=False)
        precision = precision_of(args) or gpu.precision
        cases.append(Case(Request(gpt_of(args), gpu, row["gpus"], strategy.global_batch, precision), strategy))
    request = cases[0].request
    return Row(
        row["name"], row["family"], row["gpu"], row["gpus"], tuple(cases), _measured_s(row, request), is_judge,
        "assumed" in row,
    )  # fmt: skip


def _measured_s(row: dict[str, Any], request: Request) -> float:
    gpt, batch, gpus = request.gpt, request.global_batch, request.num_gpus
    if "step_s" in row:
        return float(row["step_s"])
    if "tokens_per_s_per_gpu" in row:
        return batch * gpt.seq_length / (float(row["tokens_per_s_per_gpu"]) * gpus)
    operations = gpt.flops(batch) + (_hidden_square(gpt, batch) if row.get("attention") == "whole" else 0.0)
    return operations / (1e12 * float(row["tflops_per_gpu"]) * gpus)


def _hidden_square(gpt: GPT, batch: int) -> float:
    """Operations of a step in the half of the attention's square that a causal mask hides."""
    width = gpt.head_width * gpt.num_attention_heads
    return 6.0 * batch * gpt.seq_length**2 * width * gpt.num_layers


def compare(rows: Sequence[Row]) -> list[Compared]:
    """Return each row with its estimate."""
    return [Compared(row, row.estimate()) for row in rows]


def fit(rows: Sequence[Row], names: Sequence[str] = FITTED) -> dict[str, float]:
    """Return the achieved parts with which the rows that calibrate differ least, on average of |log(ratio)|.

    By steps of one number at a time that become smaller, with the formula of a step. rows: of one kind of GPU.
    """
    calibrating = [row for row in rows if not row.is_judge]
    start = calibrating[0].cases[0].request.gpu
    values = {name: getattr(start, name) or 3e-3 for name in names}

    def loss(values: dict[str, float]) -> float:
        found = (row.estimate(lambda gpu: gpu.with_parts(values)).step.step for row in calibrating)
        pairs = zip(found, calibrating, strict=True)
        return sum(abs(math.log(time / row.measured_s)) for time, row in pairs) / len(calibrating)

    least, steps = loss(values), dict.fromkeys(names, 1.15)
    while max(steps.values()) > 1.004:
        for name in names:
            for factor in (steps[name], 1 / steps[name]):
                tried = values | {name: min(1.0, values[name] * factor)}
                if (found := loss(tried)) < least - 1e-6:
                    values, least = tried, found
                    break
            else:
                steps[name] **= 0.5
    return values


def fitted(rows: Sequence[Row]) -> str:
    """Print what `fit` finds for each kind of GPU that has rows to calibrate, in the words of a profile."""
    lines = []
    for kind in sorted({row.gpu for row in rows if not row.is_judge}):
        own = [row for row in rows if row.gpu == kind]
        requests = [row.cases[0].request for row in own if not row.is_judge]
        names = [name for name in FITTED if _counts(name, requests)]
        found = fit(own, names)
        words = (
            f"experts_ms: {1e3 * found[name]:.2f}" if name == "experts_s" else f"{name}: {found[name]:.3f}"
            for name in names
        )
        lines.append(f"{kind}: achievable: {{{', '.join(words)}}}")
    return "\n".join(lines)


def _counts(name: str, requests: Sequence[Request]) -> bool:
    """Return whether an achieved part has a use in such jobs."""
    return any({
        "matmul": True, "matmul_fp8": each.precision.startswith("fp8"), "attention": each.gpu.flash_attention,
        "experts_s": each.gpt.experts is not None,
    }[name] for each in requests)  # fmt: skip


# Tables, in Markdown


def table(compared: Sequence[Compared]) -> str:
    """Print each row with both times and the error. * marks rows of which the source leaves something open."""
    lines = [
        "| job | half | TP | PP | VP | EP | CP | MBS | batch | tokens | precision | measured s | estimate s | error |",
        "|" + "---|" * 14,
    ]
    for each in compared:
        (row, found), request = each, each.row.cases[0].request
        s = found.strategy
        lines.append(
            f"| {row.gpu}: {row.name}{'*' if row.is_assumed else ''} | {_half(row)} | {s.tp} | {s.pp} | {s.chunks} |"
            f" {s.ep} | {s.cp} | {s.micro_batch} | {s.global_batch} | {request.gpt.seq_length} | {request.precision} |"
            f" {row.measured_s:.2f} | {found.step.step:.2f} | {100 * each.error:+.0f}% |"
        )
    return "\n".join(lines)


def _half(row: Row) -> str:
    return "judges" if row.is_judge else "calibrates"


def summary(compared: Sequence[Compared]) -> str:
    """Print the errors of each kind of GPU, family and half: the mean, the median and the largest."""
    lines = ["| rows | half | count | mean error | median | largest |", "|---|---|---|---|---|---|"]

    def line(name: str, half: str, of_half: list[Compared]) -> None:
        sizes = sorted(abs(each.error) for each in of_half)
        parts = (sum(sizes) / len(sizes), sizes[len(sizes) // 2], sizes[-1])
        lines.append(f"| {name} | {half} | {len(sizes)} | " + " | ".join(f"{100 * part:.0f}%" for part in parts) + " |")

    kinds: dict[tuple[str, str, str], list[Compared]] = {}
    for each in compared:
        kinds.setdefault((each.row.gpu, each.row.family, _half(each.row)), []).append(each)
    for (gpu, family, half), of_kind in sorted(kinds.items()):
        line(f"{gpu}, {family}", half, of_kind)
    for half in ("calibrates", "judges"):
        if of_half := [each for each in compared if _half(each.row) == half]:
            line("**all**", half, of_half)
    return "\n".join(lines)
