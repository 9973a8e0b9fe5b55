"""Random command lines of megatron_bfpp.run and megatron_bfpp.pretrain_gpt, up to where training would start.

A process that has Megatron imported forks itself for each case. Megatron refuses in its own words: a fault is
only an error that is raised in this package and is none that users are shown.
"""

import contextlib
import functools
import io
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import fuzz
import fuzz_words
from fuzz_files import chance
from gpt import MODEL

import megatron_bfpp
from megatron_bfpp import pretrain_gpt, run

PACKAGE = str(Path(megatron_bfpp.__file__).parent)
OURS = {
    "--pipeline-schedule": ["breadth-first", "1f1b"], "--breadth-first-backward": ["eager", "late"],
    "--breadth-first-group-size": [1, 2, 4],
    "--breadth-first-engine": ["plan", "megatron"], "--breadth-first-resident-chunks": [1, 2],
    "--bfpp-trace-steps": ["1-2", "2"], "--bfpp-run-dir": ["new", "folder"],
    "--bfpp-log-communication": None, "--pipeline-model-parallel-size": [2, 4],
    "--num-virtual-stages-per-pipeline-rank": [2],
    "--num-layers-per-virtual-pipeline-stage": [1, 2], "--num-layers": [8, 7, 2, 1], "--global-batch-size": [4, 8],
    "--tensor-model-parallel-size": [2],
    "--use-distributed-optimizer": None, "--overlap-grad-reduce": None, "--overlap-param-gather": None,
    "--use-torch-fsdp2": None,
    "--untie-embeddings-and-output-weights": None, "--ckpt-format": ["torch_dist"],
    "--pipeline-model-parallel-layout": ["Et*2|t*2|t*2|t*2L", "E|L", "Et*8L"],
    "--decoder-first-pipeline-num-layers": [1], "--microbatch-group-size-per-virtual-pipeline-stage": [2, 4],
    "--no-gradient-accumulation-fusion": None,
    "--rampup-batch-size": ["4 4 8"], "--fp16": None, "--bf16": None, "--mtp-num-layers": [1],
    "--enable-cuda-graph": None, "--sft": None,
}  # fmt: skip


def pretrain_words(rng):
    words = [
        *MODEL,
        *fuzz_words.flags(
            rng, OURS, ("--pipeline-schedule", "--pipeline-model-parallel-size"), rng.choice((0, 0.05, 0.15))
        ),
    ]
    if chance(rng, 0.1):
        words = words[:-1]
    if chance(rng, 0.9):
        return ["--device", "cpu", *words]
    return [
        *rng.choice(
            (
                ["--device"],
                ["--device="],
                ["--device", rng.choice(fuzz_words.TEXTS)],
                ["--device=cuda"],
                ["--device", "cpu", "--device"],
            )
        ),
        *words,
    ]


def run_words(rng):
    script = rng.choice(["script.py", "folder", "missing.py", "", "a\0b", "--", "\udcff", "/dev/null"])
    device = rng.choice(
        (
            [],
            ["--device", "cpu"],
            ["--device=cpu"],
            ["--device"],
            ["--device", "--device"],
            ["--device=" + rng.choice(fuzz_words.TEXTS)],
            ["-h"],
        )
    )
    return [*device, script, *rng.sample(fuzz_words.TEXTS, 2)] if chance(rng, 0.95) else device


def stop_before_training():
    from megatron import training

    original = training.pretrain

    @functools.wraps(original)
    def stopped(*args, **kwargs):
        raise fuzz.Stopped("the command line was accepted")

    training.pretrain = stopped


def outcome(kind, words):
    """(what happened, complaint) in this process, which is of no use afterwards."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    what = "accepted"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if kind == "run":
                run.main(words)
            else:
                stop_before_training()
                run.launch(words, pretrain_gpt.main)
        except SystemExit as stop:
            what = f"exit {stop.code}"
        except BaseException as error:  # the child ends here; its parent reads what is written
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            if last.startswith(PACKAGE) or kind == "run":
                return "fault", traceback.format_exc(limit=-6)
            return "refused by Megatron", ""
        err.flush()
    text = err.buffer.getvalue().decode()
    ours = text[text.find("megatron_bfpp: error:") :] if "megatron_bfpp: error:" in text else ""
    if "the command line was accepted" in ours:
        return "accepted", ""
    if len(ours.splitlines()) > 3:
        return what, f"{len(ours.splitlines())} lines of error: {ours}"
    return ("refused by us" if ours else what), "" if what in (
        "accepted",
        "exit 0",
        "exit 2",
    ) else f"{what}: {text[-500:]}"


def run_cases(results, first, count):
    """Write a line per case to `results`; called in a process with Megatron."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")
    Path("script.py").write_text("import sys\nprint(sys.argv)\n")
    Path("folder").mkdir(exist_ok=True)
    for seed in range(first, first + count):
        rng = random.Random(f"job {seed}")
        kind = "run" if chance(rng, 0.3) else "pretrain_gpt"
        words = run_words(rng) if kind == "run" else pretrain_words(rng)
        child = os.fork()
        if child == 0:
            signal.alarm(240)  # ends the process: told as a hang
            what, wrong = outcome(kind, words)
            with open(results, "a") as file:
                file.write(json.dumps([seed, kind, what, wrong and f"{words!r:.1500}\n{wrong}"]) + "\n")
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            with open(results, "a") as file:
                file.write(json.dumps([seed, kind, "fault", f"{words!r:.1500}\nhung, or ended its process"]) + "\n")


if __name__ == "__main__":
    import megatron.training.training  # noqa: F401 - once, for all forked jobs

    os.chdir(sys.argv[3])
    run_cases("results.jsonl", int(sys.argv[1]), int(sys.argv[2]))
