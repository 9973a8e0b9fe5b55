"""Trainers call Megatron-Core in an order of their own: breadth-first gives them the bits of the default schedule.

tests/support/trainers/ has a driver for each, which says at which commit the trainer was read. In every run: packed
sequences of many lengths, three numbers of micro-batches, forwards alone between training steps (the log-probabilities
of two models, or an evaluation), and every loss, gradient norm, log-probability and parameter compared.
docs/guide/trainers.md is the user's page.
"""

import json
import os
from dataclasses import replace
from importlib import import_module

import pytest
from jobs import run_job
from trainers.tiny import Job

pytestmark = pytest.mark.slow

ALL = bool(os.environ.get("BFPP_ALL_CASES"))
TIMEOUT_S, PAUSE_S = 8, 10  # of the watchdog; between steps
MICROBATCHES = {2: ((4, 2), (6,), (2,)), 4: ((8, 4), (12,), (4,))}  # by pipeline ranks, of the steps of each rollout
# trainer, variant, ranks, pipeline ranks. BFPP_ALL_CASES=1 runs each variant with each of the shapes.
SOME_CASES = [
    *(("slime", "offload", 4, 4), ("verl", "offload", 4, 2), ("areal", "overlap", 4, 2)),
    *(("nemo_rl", "", 2, 2), ("ms_swift", "lora", 4, 2), ("ms_swift", "dpo", 2, 2)),
]
VARIANTS = {
    "slime": ("", "flags", "offload"),
    "verl": ("", "offload", "tokens"),
    "areal": ("", "overlap"),
    "nemo_rl": ("",),
    "ms_swift": ("", "lora", "dpo"),
}
ALL_CASES = [
    (trainer, variant, ranks, pp)
    for trainer, variants in VARIANTS.items()
    for variant in variants
    for ranks, pp in ((2, 2), (4, 2), (4, 4))
]


def records(trainer: str, ranks: int, job: Job) -> list[list[list[str]]]:
    """Run the driver of a trainer; return what each rank recorded."""
    run_job(import_module(f"trainers.{trainer}_calls").main, ranks, job.folder, job)
    return [json.loads((job.folder / f"{job.schedule}{rank}.json").read_text()) for rank in range(ranks)]


def assert_same(trainer: str, ranks: int, job: Job, **ours) -> None:
    """Assert that breadth-first has every bit of the default schedule. ours: what its job has otherwise."""
    default = records(trainer, ranks, job)
    last = default[-1]
    steps = [bits for name, bits in last if name == "losses"]
    assert len(set(steps)) == len(steps) == sum(map(len, job.rollouts)), "the losses do not move: nothing is compared"
    names = {name for name, _ in last}
    assert {"grad norm", "parameters"} <= names and names & {"ref_log_probs", "evaluation"}
    assert records(trainer, ranks, replace(job, schedule="breadth-first", **ours)) == default


@pytest.mark.parametrize("trainer, variant, ranks, pp", ALL_CASES if ALL else SOME_CASES)
def test_the_same_bits_as_under_the_default_schedule(trainer, variant, ranks, pp, tmp_path):
    assert_same(trainer, ranks, Job("1f1b", tmp_path, pp, rollouts=MICROBATCHES[pp], variant=variant))


def test_a_pause_longer_than_the_watchdogs_time_ends_no_job(tmp_path):
    # The trainer with the plugin's flags on its command line is the one that has a watchdog.
    job = Job("1f1b", tmp_path, rollouts=MICROBATCHES[2], variant="flags")
    assert_same("slime", 2, job, pause_s=PAUSE_S, flags=("--bfpp-timeout-seconds", str(TIMEOUT_S)))
    assert f"an action of a step may take {TIMEOUT_S} s" in (tmp_path / "rank0.log").read_text()


@pytest.mark.parametrize(
    "trainer, chunks", [(each, chunks) for each in ("verl", "areal") for chunks in (4, 2)][: 4 if ALL else 1]
)
def test_a_checkpoint_goes_on_under_breadth_first_with_any_number_of_chunks(trainer, chunks, tmp_path):
    job = Job("1f1b", tmp_path, rollouts=((4,),), variant="save")
    records(trainer, 2, job)
    default = records(trainer, 2, replace(job, variant="load"))[-1]
    ours = records(trainer, 2, replace(job, variant="load", schedule="breadth-first", chunks=chunks))[-1]
    # Under another placement the norm sums the same squares in another order, and clips by other bits.
    same = {"ref_log_probs", "old_log_probs", "losses", *(("grad norm", "parameters") if chunks == job.chunks else ())}
    assert [line for line in ours if line[0] in same] == [line for line in default if line[0] in same]
    assert same <= {name for name, _ in default}


def _orders() -> None:
    """Compare Megatron's table of the order with the forwards of every rank's plan of a pass without backwards."""
    from megatron.core.pipeline_parallel import schedules

    import megatron_bfpp
    from megatron_bfpp.integration.flags.settings import Settings
    from megatron_bfpp.schedule import Op, PipelineShape

    def by_verl(*sizes: int) -> list[tuple[int, int]]:
        """Ask as a module of verl does."""
        return eval("ask(*sizes)", {"__name__": "verl.utils", "ask": schedules.get_schedule_table, "sizes": sizes})

    megatrons = schedules.get_schedule_table(8, 2, 4)
    megatron_bfpp.enable("breadth-first", device="cpu")
    for pp, chunks, count, group in [(4, 2, 8, None), (4, 2, 6, None), (2, 3, 5, None), (4, 2, 8, 4)]:
        plan = Settings("breadth-first", group_size=group).plan_of(PipelineShape(pp, chunks, count), evaluation=True)
        table = by_verl(count, chunks, pp)
        for actions in plan.actions:
            assert [(each.microbatch, each.stage // pp) for each in actions if each.op is Op.F] == table
    assert by_verl(8, 2, 4) != megatrons
    assert schedules.get_schedule_table(8, 2, 4) == megatrons, "Megatron's own schedule runs by it"
    megatron_bfpp.disable()
    assert by_verl(8, 2, 4) == megatrons


def test_verl_gets_the_order_of_the_plan_while_breadth_first_is_on_and_megatron_its_own(tmp_path):
    run_job(_orders, 1, tmp_path)
