"""Random command lines for every command of bfpp, and damaged files for them to read: used by fuzz.py.

Each command returns its words; `folder` is the working directory of the case.
"""

import json
from pathlib import Path

import ab_runs
from fuzz_files import TEXTS, chance, config, damaged, json_file
from traces import document

from megatron_bfpp.schedule import PipelineShape, breadth_first, formats, lower
from megatron_bfpp.schedule.names import ORDERS
from megatron_bfpp.schedule.orders import weight_lags

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PROFILES = sorted((ROOT / "megatron_bfpp/planner/profiles").glob("*.yaml"))


def flags(rng, sane, needed=(), part=0.3):
    """Draw some of the flags, in any order; a quarter of the draws has only good values.

    sane: flag -> good values; None for a flag without a value.
    """
    words, wild = [], rng.choice((None, 0, 0.05, 0.3))
    slip = 0 if wild is None else 0.05
    for flag in [*needed, *(flag for flag in sane if flag not in needed and chance(rng, part))]:
        if flag in needed and chance(rng, slip):
            continue
        values = sane[flag]
        word = rng.choice(TEXTS) if values is None or chance(rng, wild or 0) else str(rng.choice(values))
        if values is None:
            words.append([f"{flag}={word}" if chance(rng, slip) else flag])
        elif chance(rng, slip):
            words.append([flag])
        else:
            words.append([f"{flag}={word}"] if chance(rng, 0.3) else [flag, word])
    if words and chance(rng, 2 * slip):
        words.append(rng.choice(words))
    if chance(rng, slip):
        words.append([rng.choice([*TEXTS, "--unknown", "-x"])])
    rng.shuffle(words)
    return [word for group in words for word in group]


def outputs(*endings):
    """Places to write to, good and bad."""
    names = [f"{name}.{ending}" for name in ("new", "before", "dangling") for ending in endings]
    bad = [
        "folder",
        "missing/file",
        "/dev/full",
        "/dev/null",
        "",
        "a\0b",
        "n" * 300,
        "\udcff.svg",
        "/proc/self/new",
        "before.svg/x",
        "loop",
    ]
    return names * 2 + bad


SMALL = [1, 2, 3, 4, 5]


def show(rng, folder):
    sane = {"--pp": [2, 3, 4], "--chunks": [1, 2, 3], "--microbatches": [*SMALL, 8], "--order": list(ORDERS),
            "--group": SMALL, "--backward": ["eager", "late"], "--backward-time": [0.5, 2, 3],
            "--weight-lag": [0, 1, 3], "--weights-time": [0.3, 1],
            "--hop": [0, 0.5], "--transfer": [0, 0.2], "--gather": [0, 3], "--reduction": [0, 6],
            "--trace": outputs("json"), "--svg": outputs("svg"), "--html": outputs("html"),
            "--csv": outputs("csv"), "--plan": None, "--resident-chunks": [1, 2], "--text": None,
            "--wide": None}  # fmt: skip
    if chance(rng, 0.03):  # matplotlib is slow
        sane["--png"] = outputs("png", "xyz")
    if chance(rng, 0.3):
        (folder / "plan.csv").write_bytes(plan_file(rng)[1])
        return ["show", rng.choice(["plan.csv"] * 9 + ["folder", "missing", "-", "/dev/null", ""]), *flags(rng, sane)]
    return ["show", *flags(rng, sane, ("--pp", "--chunks", "--microbatches"))]


def plan_file(rng):
    """A shape, and a plan of it as a file, mostly damaged."""
    shape = PipelineShape(rng.choice((2, 3)), rng.choice((1, 2)), rng.choice((2, 4)))
    order = breadth_first(shape, weight_lag=rng.choice((None, weight_lags(shape))))
    sound = lower(order, shape, resident_chunks=rng.choice((None, None, 1, 2)))
    text = rng.choice((formats.to_csv, formats.to_text))(sound).encode()
    return shape, text if chance(rng, 0.3) else damaged(rng, text)


def plan(rng, folder):
    small = ROOT / "configs/quickstart.yaml"  # the others fit on no such few GPUs
    if chance(rng, 0.2):
        (folder / "model.yaml").write_bytes(small.read_bytes())
        words = ["plan", "model.yaml", "--gpus", rng.choice(("4", "8")), "--gpu", rng.choice(("v100-32", "h100-80"))]
        return [*words, "--global-batch", rng.choice(("8", "8-32")), *rng.choice(([], ["--rejected"], ["--top", "3"]))]
    (folder / "model.yaml").write_bytes(config(rng, rng.choice([small, *CONFIGS]) if chance(rng, 0.5) else small))
    (folder / "gpu.yaml").write_bytes(config(rng, rng.choice(PROFILES)))
    sane = {"--gpus": [1, 4, 8, 16], "--gpu": ["gpu.yaml", "v100-32", "h100-80"],
            "--global-batch": [8, "16,32", "8-32"], "--pp": [1, 2, 4], "--tp": [1, 2], "--chunks": [1, 2],
            "--micro-batch": [1, 2], "--group": [4, 8], "--schedule": ["breadth-first", "1f1b,interleaved"],
            "--sharding": ["zero1", "zero3"], "--recompute": ["none", "full,selective"],
            "--precision": ["bf16", "fp16", "fp32"], "--no-sequence-parallel": None, "--no-overlap": None,
            "--reserve-gb": [4, 0], "--hypothetical": None, "--as-configured": None, "--calibrate": [1, 10],
            "--measured-gpus": [8], "--top": [1, 3], "--rejected": None, "--json": outputs("json"),
            "--critical-batch-size": [100]}  # fmt: skip
    model = ["model.yaml"] if chance(rng, 0.8) else ["--", *flags(rng, MODEL_FLAGS, tuple(MODEL_FLAGS)[:5])]
    words = flags(rng, sane, ("--gpus", "--gpu", "--pp", "--tp", "--global-batch"))
    return ["plan", *([*words, *model] if chance(rng, 0.5) or model[0] == "--" else [*model, *words])]


MODEL_FLAGS = {"--num-layers": [4, 8], "--hidden-size": [64, 512], "--num-attention-heads": [4, 8],
               "--seq-length": [128, 1024], "--vocab-size": [1000, 50000], "--ffn-hidden-size": [256],
               "--micro-batch-size": [1, 2], "--global-batch-size": [8, 16],
               "--pipeline-model-parallel-size": [1, 2, 4], "--tensor-model-parallel-size": [1, 2],
               "--num-virtual-stages-per-pipeline-rank": [2], "--bf16": None, "--swiglu": None,
               "--pipeline-schedule": ["breadth-first", "1f1b"], "--breadth-first-group-size": [2, 4]}  # fmt: skip


def check(rng, folder):
    """A damaged plan, or the command line of a dry run, which ends where it would start Megatron."""
    if chance(rng, 0.3):
        (folder / "model.yaml").write_bytes(config(rng, rng.choice(CONFIGS)))
        sane = {
            "--config": ["model.yaml"],
            "--gpus": [8, 64],
            "--gpu": ["v100-32", "h100-80"],
            "--rank": [0, "0,1"],
            "--reserve-gb": [4],
            "--json": outputs("json"),
        }
        return [
            "check",
            *flags(rng, sane, ("--config", "--gpus")),
            *(["--", *flags(rng, MODEL_FLAGS)] if chance(rng, 0.3) else []),
        ]
    shape, data = plan_file(rng)
    (folder / "plan.csv").write_bytes(data)
    sane = {"--pp": [shape.pp_size], "--chunks": [shape.num_chunks], "--microbatches": [shape.num_microbatches]}
    return [
        "check",
        rng.choice(["plan.csv"] * 9 + ["folder", "missing", "-", "dangling.csv", "/dev/null", ""]),
        *flags(rng, sane),
    ]


def compare(rng, folder):
    paths = [path.name for path in ab_runs.two_arms(folder, rounds=rng.choice((1, 2)))]
    files = [folder / run / name for run in paths for name in ("run.json", "steps.jsonl", "end.json")]
    for path in rng.sample(files, rng.choice((0, 1, 1, 2, 4))):
        data = path.read_bytes()
        if path.suffix == ".jsonl" and chance(rng, 0.7):
            lines = data.splitlines()
            at = rng.randrange(len(lines))
            lines[at] = json_file(rng, json.loads(lines[at]))
            path.write_bytes(b"\n".join(lines))
        elif path.suffix == ".json" and chance(rng, 0.8):
            path.write_bytes(json_file(rng, json.loads(data)))
        elif chance(rng, 0.3):
            path.unlink()
            if chance(rng, 0.5):
                path.mkdir()
        else:
            path.write_bytes(damaged(rng, data))
    sane = {
        "--html": outputs("html"),
        "--markdown": outputs("md"),
        "--json": outputs("json"),
        "--warmup": [0, 2, 5],
        "--loss-tolerance": [0, 0.01],
        "--force": None,
    }
    if chance(rng, 0.2):
        paths = rng.sample([*paths, "folder", ".", "missing", "", "/dev/null", "a\0b", "\udcff"], rng.choice((1, 2, 3)))
    return ["compare", *paths, *(["--force"] if chance(rng, 0.5) else []), *flags(rng, sane)]


def trace(rng, folder):
    value = document(waits=chance(rng, 0.5))
    (folder / "trace.json").write_bytes(json_file(rng, value) if chance(rng, 0.9) else json.dumps(value).encode())
    path = rng.choice(["trace.json"] * 9 + ["folder", "missing", "/dev/null", "", "a\0b", "dangling.json"])
    return ["trace", path, *flags(rng, {"--svg": outputs("svg"), "--step": [20]})]


def bench(rng, folder):
    (folder / "model.yaml").write_bytes(config(rng, rng.choice(CONFIGS)))
    sane = {"--set": ["short", "full"], "--shape": ["4,2,8", "2,2,2"], "--hop": [0.5],
            "--model": ["model.yaml"], "--gpu": ["h100-80"], "--gpus": [64, 512], "--forward-ms": [15],
            "--backward-time": [2], "--transfer": [0.5], "--reduction": [1], "--gather": [1], "--dp": [2],
            "--buckets": [4], "--shared-card": None, "--half-duplex": None, "--jitter": [0.1],
            "--arm": ["interleaved"], "--repeat": [1], "--json": outputs("json"), "--markdown": outputs("md"),
            "--plot": outputs("png")}  # fmt: skip
    return ["bench", *flags(rng, sane, ("--model", "--gpu", "--gpus") if chance(rng, 0.3) else ())]


def doctor(rng, folder):
    return ["doctor", *flags(rng, {"--no-run": None, "--gpu-trial": None, "--json": outputs("json")})]


def nothing(rng, folder):
    return [rng.choice([*TEXTS, "show", "--version", "--help"]) for _ in range(rng.randrange(3))]


COMMANDS = {each.__name__: each for each in (show, plan, check, compare, trace, bench, doctor, nothing)}
