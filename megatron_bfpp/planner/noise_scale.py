"""What a batch size costs in samples.

Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162. To reach a given loss
with batches of B sequences, training needs S (1 + B / B_crit) sequences, where S is what it needs with small batches,
and B_crit, the critical batch size, is measured for the task (the gradient noise scale approximates it). Hence a
schedule that is fast at a small batch per GPU makes training cheaper at equal time, or faster at equal cost.
"""

from typing import NamedTuple

__all__ = ["CLUSTERS", "TradeOff", "trade_off"]

CLUSTERS = tuple(2**power for power in range(5, 16))  # GPUs


class TradeOff(NamedTuple):
    """Days and GPU-days of one cluster, per billion tokens that small batches would need, at the best batch per GPU."""

    num_gpus: int
    days: float
    gpu_days: float
    batch_per_gpu: float


def trade_off(
    seconds_of: dict[float, float], seq_length: int, critical_batch: float, smallest: int = 1
) -> list[TradeOff]:
    """Return the fastest training on each cluster of at least `smallest` GPUs.

    seconds_of: batch per GPU -> GPU-seconds of a sequence. A cluster that grows by data parallelism keeps them if the
        cost of data-parallel traffic stays the same, as that of rings over any number of nodes nearly does.
    """
    found = []
    for num_gpus in (each for each in CLUSTERS if each >= smallest):
        # Samples are in proportion to 1 + B / B_crit; each takes seconds / num_gpus.
        best_s, best = min(
            ((1 + each * num_gpus / critical_batch) * seconds / num_gpus, each) for each, seconds in seconds_of.items()
        )
        days = best_s * 1e9 / seq_length / 86400
        found.append(TradeOff(num_gpus, days, days * num_gpus, best))
    return found
