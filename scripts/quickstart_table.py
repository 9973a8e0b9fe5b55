"""The quickstart's result: what each arm lost, and whether all arms computed the same bits.

    python scripts/quickstart_table.py --steps 40 --folder .quickstart 1f1b 1f1b-grouped breadth-first

Reads FOLDER/ARM.jsonl (written under BFPP_STEP_LOG). Exit code 1 if an arm differs from the first or is incomplete.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

WARM_UP_STEPS = 5  # not timed: caches fill, communicators are made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("arms", nargs="+")
    args = parser.parse_args()
    runs = {arm: read(args.folder / f"{arm}.jsonl") for arm in args.arms}
    reference = bits(runs[args.arms[0]])
    good = len(reference) == args.steps
    print(
        f"\n{'arm':<15}{'steps':>6}{'first loss':>12}{'last loss':>12}   {'losses and gradient norms':<30}{'step time':>10}"
    )
    for arm, steps in runs.items():
        same = bits(steps) == reference
        good = good and same
        verdict = f"bit-identical to {args.arms[0]}" if same else difference(reference, bits(steps))
        timed = [step["step_time_s"] for step in steps[WARM_UP_STEPS:]]
        step_time = f"{statistics.median(timed) * 1e3:.0f} ms" if timed else "-"
        first, last = (steps[i]["lm loss"] for i in (0, -1)) if steps else (float("nan"),) * 2
        verdict = "(reference)" if arm == args.arms[0] else verdict
        print(f"{arm:<15}{len(steps):>6}{first:>12.6f}{last:>12.6f}   {verdict:<30}{step_time:>10}")
    print("Step times are medians on this CPU, where no network or GPU works beside it: they do not predict a cluster.")
    if not good:
        print(
            f"NOT all arms have {args.steps} steps with the bits of {args.arms[0]}. Logs: {args.folder}",
            file=sys.stderr,
        )
    return 0 if good else 1


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bits(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """Per step, every value with all its bits."""
    return [{name: value for name, value in step.items() if name.endswith(" hex")} for step in steps]


def difference(reference: list[dict[str, float]], other: list[dict[str, float]]) -> str:
    for step, (one, two) in enumerate(zip(reference, other), 1):
        if one != two:
            return f"DIFFERENT from step {step}"
    return f"INCOMPLETE: {len(other)} of {len(reference)}"


if __name__ == "__main__":
    sys.exit(main())
