"""The picture of `bfpp plan`: time against batch size per GPU, and the trade-off of cost and time. Needs matplotlib."""

from __future__ import annotations

import os
from typing import Any

from ..errors import UserError
from .noise_scale import trade_off
from .search import Found, Request
from .strategy import SCHEDULES
from .table import best_of_schedules

__all__ = ["plot"]

_STYLES: dict[str, dict[str, Any]] = {
    "no-pipeline": {"color": "#9aa0a6", "linestyle": ":"},
    "1f1b": {"color": "#5f6368", "linestyle": "--"},
    "interleaved": {"color": "#1854a0"},
    "interleaved-grouped": {"color": "#9bbcf0"},
    "breadth-first": {"color": "#c46200"},
    "breadth-first-late": {"color": "#e8a35c", "linestyle": "--"},
}


def plot(found: dict[int, Found], request: Request, path: str, critical_batch: float | None, title: str) -> None:
    """found: by global batch. The second panel needs a critical batch size, in sequences."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--plot needs matplotlib.\n  pip install 'megatron-bfpp[report]', or leave --plot out."
        ) from None
    seconds = _gpu_seconds(found, request)
    figure = Figure(figsize=(11 if critical_batch else 6, 4.4), layout="constrained")
    panels = figure.subplots(1, 2 if critical_batch else 1, squeeze=False)[0]
    for name, of_batch in seconds.items():
        ideal = request.gpt.flops(1) / request.gpu.peak_flops[request.precision]
        shares = [ideal / each for each in of_batch.values()]
        panels[0].plot(
            list(of_batch), [100 * share for share in shares], marker="o", markersize=3, label=name, **_STYLES[name]
        )
        if critical_batch:
            curve = trade_off(of_batch, request.gpt.seq_length, critical_batch, request.num_gpus)
            panels[1].plot([each.days for each in curve], [each.gpu_days for each in curve], marker="o", markersize=3, label=name,
                           **_STYLES[name])  # fmt: skip
    _describe(panels, request, critical_batch)
    figure.suptitle(title, fontsize=10)
    panels[0].legend(fontsize=8, frameon=False)
    _write(figure, path)


def _gpu_seconds(found: dict[int, Found], request: Request) -> dict[str, dict[float, float]]:
    """Schedule -> batch per GPU -> GPU-seconds that a sequence takes with its fastest strategy."""
    seconds: dict[str, dict[float, float]] = {}
    for batch, of_batch in found.items():
        for best in best_of_schedules(of_batch):
            per_sequence = best.step.step * request.num_gpus / batch
            seconds.setdefault(best.strategy.schedule, {})[batch / request.num_gpus] = per_sequence
    return {name: seconds[name] for name in SCHEDULES if name in seconds}


def _describe(panels: Any, request: Request, critical_batch: float | None) -> None:
    panels[0].set_xscale("log", base=2)
    panels[0].set_xlabel("batch size per GPU, in sequences")
    panels[0].set_ylabel("model FLOP/s, % of the peak")
    panels[0].set_ylim(bottom=0)
    if critical_batch:
        panels[1].set_xscale("log")
        panels[1].set_yscale("log")
        panels[1].set_xlabel("days per billion tokens")
        panels[1].set_ylabel("GPU-days per billion tokens")
        panels[1].set_title(
            f"clusters of {request.num_gpus} to 32768 GPUs, critical batch {critical_batch:g} sequences", fontsize=8
        )
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)


def _write(figure: Any, path: str) -> None:
    """Under another name first: a picture is there whole or not at all."""
    stem, ending = os.path.splitext(path)
    temporary = f"{stem}.bfpp-{os.getpid()}{ending or '.png'}"
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
