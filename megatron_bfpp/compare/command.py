"""bfpp compare: what an A/B showed, from the directories of its runs alone."""

import argparse
import json
import os
from typing import Any

from ..console.errors import require
from ..console.files import write_wanted
from ..console.numbers import at_least, between
from .numbers import Comparison, compare
from .page import page
from .runs import Run, load
from .text import COLUMNS, cells, markdown, terminal


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `bfpp compare` to the subcommands."""
    parser = commands.add_parser("compare", help="compare finished runs: time, memory, losses, configuration")
    add = parser.add_argument
    place = "a directory that --bfpp-run-dir had, or one that holds such; the arm of the first is the reference"
    add("runs", nargs="+", metavar="RUN", help=place)
    add("--html", metavar="PATH", help="write a page that needs nothing else")
    add("--markdown", metavar="PATH", help="write the table as Markdown")
    add("--json", metavar="PATH", help="write every number")
    dropped = "steps to drop after each start; default 5, or half of a short run"
    add("--warmup", type=at_least(0, 1_000_000), metavar="N", help=dropped)
    tolerance = "relative difference of losses that exit code 0 allows; default 0: every bit"
    add("--loss-tolerance", type=between(0, 0.999999), default=0.0, metavar="X", help=tolerance)
    add("--force", action="store_true", help="compare runs that differ in more than the schedule")
    add("--wandb-project", metavar="NAME", help="make one run of W&B there, with table and files")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 if every run finished with the losses of the first, else 1. Raise UserError for files that fail."""
    if args.wandb_project is not None:
        require("wandb", "--wandb-project")
        require("jinja2", "the page of --wandb-project")
    if args.html is not None:
        require("jinja2", "--html")
    runs = load(args.runs)
    comparison = compare(runs, args.warmup, args.force, args.loss_tolerance)
    print(terminal(comparison))
    try:
        write_wanted(
            args, html=lambda: page(comparison, runs), markdown=lambda: markdown(comparison), json=comparison.as_json
        )
    finally:
        if args.wandb_project is not None:
            _to_wandb(args.wandb_project, comparison, runs)
    return 0 if comparison.is_good else 1


def _to_wandb(project: str, comparison: Comparison, runs: list[Run]) -> None:
    """Make one run of the job type "report". W&B reads group, mode and folder from its own environment variables."""
    import wandb

    names = [arm.name for arm in comparison.arms]
    group = os.environ.get("WANDB_RUN_GROUP")
    report: Any = wandb.init(
        project=project, name=f"report {group or ' / '.join(names)}"[:128], job_type="report",
        config={"arms": names, "warmup": comparison.warmup, **comparison.facts},
    )  # fmt: skip
    report.log({"comparison": wandb.Table(columns=list(COLUMNS), data=[cells(arm) for arm in comparison.arms])})
    for arm in comparison.arms:
        if arm.ratio is not None:
            report.summary[f"ratio/{arm.name}"] = arm.ratio
    artifact = wandb.Artifact("comparison", type="report")
    texts = page(comparison, runs), markdown(comparison), json.dumps(comparison.as_json(), indent=1) + "\n"
    for name, text in zip(("report.html", "report.md", "report.json"), texts, strict=True):
        with artifact.new_file(name, encoding="utf-8") as file:
            file.write(text)
    for place, each in enumerate(runs, 1):  # two may have the same name
        for name in ("trace.json", "timeline.svg"):
            if (each.path / name).is_file():
                artifact.add_file(str(each.path / name), name=f"{place:02d} {each.path.name}/{name}")
    report.log_artifact(artifact)
    report.finish()
    print(f"W&B: one report run in the project {project}")
