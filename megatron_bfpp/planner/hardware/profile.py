"""Reads the profile of a kind of GPU: one of this package by its name, or one of the user's by its path."""

from pathlib import Path
from typing import Any

import yaml

from ...console.errors import UserError
from .gpu import GPU, Link

__all__ = ["known_gpus", "load_gpu"]

_PROFILES = Path(__file__).parent.parent / "profiles"


def known_gpus() -> list[str]:
    """Return the names of this package's profiles."""
    return sorted(path.stem for path in _PROFILES.glob("*.yaml"))


def load_gpu(name: str) -> GPU:
    """Read a profile of this package by its name, or one of the user's by its path. Raises UserError for neither."""
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else _PROFILES / f"{name.lower()}.yaml"
    if not is_path and name.lower() not in known_gpus():
        known = ", ".join(known_gpus())
        raise UserError(f"--gpu {name} does not exist.\n  Use one of {known}, or a profile of yours: PATH.yaml.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # yaml lets through Python's own errors for a date or a number that does not exist, and for nesting too deep.
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--gpu {name} cannot be read: {reason}.") from None
    return _Reader(name, content).gpu()


_KEYS = (
    "name", "precision", "peak_tflops", "memory_gb", "memory_bandwidth_gb_s", "gpus_per_node", "node_link",
    "network_link", "compute_capability", "flash_attention", "achievable",
)  # fmt: skip
_DEFAULTS = {"compute_capability": 9.0}  # of Hopper
_ACHIEVED, _MAY_LACK = ("matmul", "half_size", "memory", "link"), ("matmul_fp8", "attention", "experts_ms")


class _Reader:
    """Takes a profile apart. Raises UserError for a key too few, too many, or with an impossible value."""

    def __init__(self, name: str, content: Any):
        self.name, self.content = name, content

    def gpu(self) -> GPU:
        content = _DEFAULTS | self.content if isinstance(self.content, dict) else self.content
        top = self._map(content, "", _KEYS)
        part = self._map(top["achievable"], "achievable", _ACHIEVED, _MAY_LACK)
        part = {"matmul_fp8": part["matmul"], "attention": part["matmul"]} | part
        parts = ("matmul", "memory", "link", "matmul_fp8", "attention")
        achieved = {key: self._number(part, key, "achievable: ", 1.0) for key in parts}
        peaks = top["peak_tflops"] if isinstance(top["peak_tflops"], dict) else {}
        if top["precision"] not in peaks or not set(peaks) <= {"fp32", "fp16", "bf16", "fp8"}:
            wanted = f"a map of fp32, fp16, bf16, fp8, with one for {top['precision']}"
            raise UserError(f"--gpu {self.name}: peak_tflops is {wanted}.")
        return GPU(
            name=str(top["name"]),
            precision=str(top["precision"]),
            peak_flops={key: 1e12 * self._number(peaks, key, "peak_tflops: ") for key in peaks},
            memory=1e9 * self._number(top, "memory_gb"),
            memory_bytes_per_s=1e9 * achieved["memory"] * self._number(top, "memory_bandwidth_gb_s"),
            gpus_per_node=int(self._number(top, "gpus_per_node")),
            node_link=self._link(top, "node_link", achieved["link"]),
            network_link=self._link(top, "network_link", achieved["link"]),
            flash_attention=bool(top["flash_attention"]),
            matmul=achieved["matmul"],
            half_size=self._number(part, "half_size", "achievable: "),
            compute_capability=self._number(top, "compute_capability"),
            matmul_fp8=achieved["matmul_fp8"],
            attention=achieved["attention"],
            experts_s=1e-3 * self._number(part, "experts_ms", "achievable: ") if "experts_ms" in part else 0.0,
        )

    def _link(self, top: dict[str, Any], key: str, achieved: float) -> Link:
        link = self._map(top[key], key, ("gb_s", "latency_us"))
        gb_s, latency_us = (self._number(link, each, f"{key}: ") for each in ("gb_s", "latency_us"))
        return Link(1e9 * achieved * gb_s, 1e-6 * latency_us)

    def _map(self, content: Any, place: str, keys: tuple[str, ...], may_lack: tuple[str, ...] = ()) -> dict[str, Any]:
        where = f"--gpu {self.name}" + (f": {place}" if place else "")
        if not isinstance(content, dict):
            raise UserError(f"{where} is no map of {', '.join(keys)}.")
        for key in content:
            if key not in (*keys, *may_lack):
                raise UserError(f"{where}: unknown key {key!r}. Known are {', '.join((*keys, *may_lack))}.")
        for key in keys:
            if key not in content:
                raise UserError(f"{where}: {key} is missing.")
        return content

    def _number(self, content: dict[str, Any], key: str, place: str = "", most: float = 1e9) -> float:
        value = content[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            wanted = f"a number above 0, at most {most:g}"
            raise UserError(f"--gpu {self.name}: {place}{key} is {value!r}; it must be {wanted}.")
        return float(value)
