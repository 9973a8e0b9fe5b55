"""Computes the numbers of an A/B from the directories of its runs. Steps belong to runs, runs to arms."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..console.errors import UserError
from . import configuration
from .confidence import Interval, ratio_interval
from .losses import Match, match
from .runs import Run, number, section, text

WARMUP = 5  # steps, if the caller names none and the runs are long enough
FEW_STEPS = 10  # of fewer, the 90th percentile is one step or none


@dataclass(frozen=True)
class RunTime:
    """Median step time of a run that counts."""

    run: str
    round: int | None
    median_s: float


@dataclass(frozen=True)
class Arm:
    """A row. A number that is unknown is None; times in seconds, memory in GiB (2**30 bytes)."""

    name: str
    runs: int
    failures: list[str]  # "NAME: REASON" of each run that did not finish
    times: list[RunTime]
    timed_steps: int  # of the run with the fewest, of those in `times`
    step_s_p50: float | None  # median over runs of each run's median, and of each run's 90th percentile
    step_s_p90: float | None
    tokens_per_s_per_gpu: float | None
    tflops_per_gpu: float | None
    peak_memory_gib: float | None  # the largest of all steps and runs
    peak_memory_rank: int | None
    bubble_measured: float | None  # median over the traced steps
    bubble_predicted: float | None
    exposed_dp_s: float | None  # of the rank that waits longest; median over the traced steps
    ratio: float | None  # of step_s_p50 to the first arm's
    interval: Interval | None
    losses: list[Match]  # of each run with steps, against the first run of the first arm; not of that one itself


@dataclass(frozen=True)
class Comparison:
    """All arms; the first is the reference. changed: how the configuration of each other arm differs."""

    arms: list[Arm]
    warmup: int
    changed: dict[str, configuration.Differences]
    facts: dict[str, str]  # versions, commits, devices, ...: what all runs have
    notes: list[str]
    loss_tolerance: float

    @property
    def is_good(self) -> bool:
        """Return whether every run finished and every loss is the reference's, within the tolerance."""
        matches = [each for arm in self.arms for each in arm.losses]
        same = all(each.losses is None or each.losses.largest <= self.loss_tolerance for each in matches)
        return same and all(each.is_comparable for each in matches) and not any(arm.failures for arm in self.arms)

    def as_json(self) -> dict[str, Any]:
        return {"format": "megatron_bfpp comparison 1", **_finite(asdict(self)), "good": self.is_good}


def compare(runs: list[Run], warmup: int | None = None, force: bool = False, loss_tolerance: float = 0.0) -> Comparison:
    """Compare arms; raise UserError if more than the schedule differs, or runs of one arm do, unless `force`."""
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    notes: list[str] = []
    changed = _configurations(by_arm, force, notes)
    warmup = _warmup(runs, notes) if warmup is None else warmup
    first = next(iter(by_arm.values()))
    with_steps = [run for run in first if run.steps]
    reference = next((run for run in with_steps if run.is_finished), with_steps[0] if with_steps else None)
    arms: list[Arm] = []
    for name, members in by_arm.items():
        arms.append(_arm(name, members, warmup, reference, arms[0] if arms else None))
        notes += (f"{name}{note}" for note in _notes(arms[-1], members))
    if reference is None and len(runs) > 1:
        notes.append(f"{first[0].arm} has no steps: there are neither ratios nor a comparison of losses")
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    return Comparison(arms, warmup, changed, _facts(runs), notes, loss_tolerance)


def _configurations(
    by_arm: dict[str, list[Run]], force: bool, notes: list[str]
) -> dict[str, configuration.Differences]:
    """Return how each arm differs from the first, if only in the schedule."""
    wrong: dict[str, None] = {}
    changed: dict[str, configuration.Differences] = {}
    known = {
        name: next((run for run in runs if not configuration.unknown(run)), runs[0]) for name, runs in by_arm.items()
    }
    first = next(iter(known.values()))
    for name, runs in by_arm.items():
        of_arm = known[name]
        for run in runs:
            within = configuration.differences(of_arm, run)
            wrong |= {f"{each} ({of_arm.name}: {a}, {run.name}: {b})": None for each, (a, b) in within.items()}
        found = configuration.differences(first, of_arm)
        for each in configuration.unexpected(found):
            wrong[f"{each} ({first.arm}: {found[each][0]}, {name}: {found[each][1]})"] = None
        if name != first.arm:
            changed[name] = found
            if not found and not configuration.unknown(first) and not configuration.unknown(of_arm):
                notes.append(f"{name} has the configuration of {first.arm}: the two measure how much runs scatter")
    if wrong and not force:
        shown = ", ".join(list(wrong)[:6]) + (f", and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        raise UserError(
            f"the runs differ in more than the schedule, so their times do not compare it: {shown}.\n"
            "  Make the runs equal in these settings, or compare them as they are with --force."
        )
    notes += [f"--force: differs besides the schedule: {each}" for each in wrong]
    return changed


def _warmup(runs: list[Run], notes: list[str]) -> int:
    """Return how many steps to drop: WARMUP, or half of the shortest finished run."""
    lengths = [len(run.steps) for run in runs if run.is_finished and run.steps]
    lengths = lengths or [len(run.steps) for run in runs if run.steps]
    shortest = min(lengths, default=0)
    if lengths and shortest // 2 < WARMUP:
        half = f"{shortest // 2} are dropped as warm-up instead of {WARMUP}"
        notes.append(f"the shortest run has {shortest} steps: {half}")
    return min(WARMUP, shortest // 2)


def _arm(name: str, runs: list[Run], warmup: int, reference: Run | None, first: Arm | None) -> Arm:
    """Return the row of an arm. Times are those of its finished runs; of the others, if none has finished."""
    timed = [(run, found) for run in runs if (found := run.timed(warmup))]
    timed = [(run, found) for run, found in timed if run.is_finished] or timed
    times = [RunTime(run.name, run.round, statistics.median(found)) for run, found in timed]
    p50 = _median(each.median_s for each in times)
    header = (timed[0][0] if timed else runs[0]).header
    gpus = number(section(header, "shape").get("world_size"))
    tokens, flops = (number(header.get(key)) for key in ("tokens_per_step", "flops_per_step"))
    gpu_s = p50 * gpus if p50 is not None and gpus else None
    peak, rank = _peak(runs)
    values = [step.values for run in runs for step in run.steps]
    reference_s = first.step_s_p50 if first else None
    ratio = p50 / reference_s if p50 is not None and reference_s is not None else None
    return Arm(
        name=name,
        runs=len(runs),
        failures=[f"{run.name}: {run.reason}" for run in runs if not run.is_finished],
        times=times,
        timed_steps=min((len(found) for _, found in timed), default=0),
        step_s_p50=p50,
        step_s_p90=_median(_p90(found) for _, found in timed),
        tokens_per_s_per_gpu=tokens / gpu_s if tokens is not None and gpu_s else None,
        tflops_per_gpu=flops / gpu_s / 1e12 if flops is not None and gpu_s else None,
        peak_memory_gib=peak,
        peak_memory_rank=rank,
        bubble_measured=_median(number(each.get("bubble_fraction_measured")) for each in values),
        bubble_predicted=_median(number(section(run.header, "plan").get("bubble_fraction_predicted")) for run in runs),
        exposed_dp_s=_median(_longest(each.get("exposed_dp_s")) for each in values),
        ratio=ratio,
        interval=ratio_interval(_by_round(times), _by_round(first.times)) if first and ratio is not None else None,
        losses=[match(reference, run) for run in runs if reference is not None and run is not reference and run.steps],
    )


def _median(values: Iterable[float | None]) -> float | None:
    """Return the median of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _p90(times: list[float]) -> float:
    return statistics.quantiles(times, n=10, method="inclusive")[-1] if len(times) > 1 else times[0]


def _longest(value: Any) -> float | None:
    """Return a number, or the largest of those of several ranks."""
    each = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return max((found for one in each if (found := number(one)) is not None), default=None)


def _peak(runs: list[Run]) -> tuple[float | None, int | None]:
    """Return GiB and rank of the largest peak of all steps, those of the warm-up too."""
    values = [step.values for run in runs for step in run.steps]
    peaks = [(number(each.get("peak_memory_gib_max_rank")), number(each.get("peak_memory_rank"))) for each in values]
    peak, rank = max(
        ((peak, rank) for peak, rank in peaks if peak is not None), key=lambda each: each[0], default=(None, None)
    )
    return peak, None if rank is None else round(rank)


def _by_round(times: list[RunTime]) -> dict[int | str, float]:
    """Return the times by round where each run has its own, else by place in the list, which pairs with nothing."""
    rounds = [each.round for each in times]
    if None in rounds or len(set(rounds)) < len(rounds):
        return {f"run {place}": each.median_s for place, each in enumerate(times)}
    return {each.round: each.median_s for each in times if each.round is not None}


def _notes(arm: Arm, runs: list[Run]) -> Iterator[str]:
    """Yield what a reader of the arm's row must know, to follow its name."""
    if arm.step_s_p50 is None:
        yield " has no timed step after the warm-up"
    elif not any(run.is_finished for run in runs):
        yield " has no finished run: its times are those of the steps before the end"
    if 0 < arm.timed_steps < FEW_STEPS:
        yield f": {arm.timed_steps} timed steps in a run are too few to say much"
    lengths = {len(run.steps) for run in runs if run.is_finished}
    if len(lengths) > 1:
        yield f": finished runs have between {min(lengths)} and {max(lengths)} steps"
    names = ", ".join(run.name for run in runs if configuration.unknown(run))
    if names:
        yield f": whether {names} has the same configuration is not known"
    if any(section(run.header, "args").get("rampup_batch_size") for run in runs):
        yield ": --rampup-batch-size: its medians mix steps of several batch sizes, its tokens are of one"
    found = arm.interval
    if found and found.low is not None and found.high is not None and not found.low <= (arm.ratio or 0) <= found.high:
        yield ": the interval, of the mean ratio, leaves out the ratio of medians: runs scatter unevenly"


def _facts(runs: list[Run]) -> dict[str, str]:
    """Return device, hosts, versions and commits; several values where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        hosts = run.header.get("hosts")
        shape = {key: value for key, value in section(run.header, "shape").items() if number(value) is not None}
        named = {
            "device": run.header.get("device"),
            "hosts": ", ".join(map(text, hosts)) if isinstance(hosts, list) else None,
            "shape": ", ".join(f"{text(key)} {value}" for key, value in shape.items()),
        }
        for part, label in (("versions", "{}"), ("commits", "commit of {}")):
            named |= {label.format(text(key)): value for key, value in section(run.header, part).items()}
        for key, value in named.items():
            if text(value):
                found.setdefault(key, {})[text(value)] = None
    return {key: " | ".join(values) for key, values in found.items()}


def _finite(value: Any) -> Any:
    """Replace what JSON does not have, infinity and not-a-number, by None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and number(value) is None else value
