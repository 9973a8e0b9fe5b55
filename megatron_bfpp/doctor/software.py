"""Rules of bfpp doctor on what is installed: each names the function of Megatron or of torch that it comes from."""

from __future__ import annotations

from typing import Any

from .line import FAIL, OK, WARN, Line, has_gpus, section

PYTHON = (3, 12)  # of the megatron-core releases that ship megatron.training
BUILD_APEX = (
    "build NVIDIA's from its repository: pip install -v --no-build-isolation --config-settings "
    '"--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" ./'
)
WITHOUT_APEX = "or train with --no-gradient-accumulation-fusion"
OPTIONAL = {
    "psutil": "Megatron needs it to save checkpoints in the format torch_dist",
    "einops": "Megatron-FSDP needs it",
    "matplotlib": "bfpp show --png, plan --plot and bench --plot need it",
    "scipy": "bfpp compare needs it for its 95% intervals",
}


def software_lines(facts: dict[str, Any]) -> list[Line]:
    lines = [_python(section(facts, "python")), _gpus(facts), _torch(facts)]
    if section(facts, "torch").get("version"):
        lines += [_cuda(facts), _nccl(facts)]
    return [*lines, _megatron(section(facts, "megatron")), _te(facts), _apex(facts), *_libraries(facts)]


def _python(found: dict[str, Any]) -> Line:
    version = ".".join(map(str, found["version"]))
    what = f"{version}, {found['executable']}, {found['cores']} cores"
    if tuple(found["version"][:2]) < PYTHON:
        return Line("Python", FAIL, what, "Python 3.12 or newer, which megatron-core 0.19 asks for too")
    return Line("Python", OK, what)


def _gpus(facts: dict[str, Any]) -> Line:
    """What the driver has, beside what torch sees."""
    smi, torch = section(facts, "nvidia_smi"), section(facts, "torch")
    driver, seen = smi.get("gpus", []), torch.get("devices", [])
    names = [gpu["name"] for gpu in driver] or [gpu["name"] for gpu in seen]
    kinds = dict.fromkeys(names)
    what = ", ".join(f"{names.count(kind)} x {kind}" for kind in kinds) or "none"
    what += f", driver {driver[0]['driver']}" if driver else f" ({smi['error']})" if smi.get("error") else ""
    if "version" in torch and len(driver) != len(seen):
        what += f"; torch sees {len(seen)}"
        visible = section(facts, "environment").get("CUDA_VISIBLE_DEVICES")
        if driver and visible is not None:
            return Line("GPUs", WARN, what, f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it, or it is meant")
        if driver and not seen:
            reason = torch.get("cuda_error") or "torch gives no reason"
            return Line(
                "GPUs", FAIL, what, f"{reason.rstrip('.')}: a torch whose CUDA this driver runs (see CUDA below)"
            )
        if driver:
            return Line("GPUs", WARN, what, "all of them in this job's allocation: torch and the driver disagree")
    if len(kinds) > 1:
        return Line("GPUs", WARN, what, "one kind: a pipeline runs at the speed of its slowest rank")
    if not names:
        return Line("GPUs", OK, f"{what}; jobs run on the CPU over gloo, for trying and testing")
    return Line("GPUs", OK, what)


def _torch(facts: dict[str, Any]) -> Line:
    torch = section(facts, "torch")
    if not torch:
        return Line("torch", FAIL, "not installed", "the torch of your container, or pip install torch")
    if "error" in torch:
        return Line("torch", FAIL, torch["error"], "a torch that imports: every job needs it")
    missing = _without_kernels(torch)
    if missing:
        built = " ".join(torch["architectures"])
        return Line(
            "torch", FAIL, f"{torch['version']} has no code for {missing}, only for {built}",
            "a build of torch for this GPU (torch.cuda._check_capability warns of the same)",
        )  # fmt: skip
    return Line("torch", OK, torch["version"])


def _without_kernels(torch: dict[str, Any]) -> str:
    """The first GPU for which this torch was not built; empty if there is none. sm_X runs on X of the same major and above."""
    built = [name.partition("_") for name in torch.get("architectures", [])]
    for device in torch["devices"]:
        major, minor = device["capability"]
        able = any(_runs(kind, version, major, minor) for kind, _, version in built)
        if built and not able:
            return f"{device['name']} (compute capability {major}.{minor})"
    return ""


def _runs(kind: str, version: str, major: int, minor: int) -> bool:
    digits = version.rstrip("abcdefghijklmnopqrstuvwxyz")  # sm_90a
    if not digits.isdigit():
        return False
    built = divmod(int(digits), 10)
    return built <= (major, minor) and (kind == "compute" or built[0] == major)


def _cuda(facts: dict[str, Any]) -> Line:
    torch, smi = section(facts, "torch"), section(facts, "nvidia_smi")
    if torch["cuda"] is None:
        status = FAIL if smi.get("gpus") else OK
        return Line("CUDA", status, "torch was built without", "a CUDA build of torch" if status == FAIL else "")
    return Line("CUDA", OK, f"{torch['cuda']}, of torch")


def _nccl(facts: dict[str, Any]) -> Line:
    torch = section(facts, "torch")
    if torch["nccl"] is None:
        advice = "a torch with NCCL: --distributed-backend nccl, Megatron's default, needs it"
        return Line("NCCL", FAIL, "torch has none", advice) if has_gpus(facts) else Line("NCCL", OK, "torch has none")
    return Line("NCCL", OK, f"{torch['nccl']}, of torch")


def _megatron(found: dict[str, Any]) -> Line:
    install = "pip install --no-deps 'megatron-core>=0.17,<0.20', or a Megatron-LM checkout on PYTHONPATH"
    if not found:
        return Line("megatron-core", FAIL, "not installed", install)
    if "error" in found:
        return Line("megatron-core", FAIL, found["error"], f"one that imports: {install}")
    what = f"{found['version']}, from {found['path']}"
    if found["refusal"]:
        return Line("megatron-core", FAIL, what, found["refusal"])
    if not found["training"]:
        return Line(
            "megatron-core", WARN, f"{what}, without megatron.training",
            "enough for megatron_bfpp.enable('breadth-first'); for the flag, a wheel or checkout that has megatron.training",
        )  # fmt: skip
    return Line("megatron-core", OK, f"{what}, with megatron.training")


def _te(facts: dict[str, Any]) -> Line:
    name, found = "Transformer Engine", section(facts, "te")
    without = "train with --transformer-impl local, or pip install --no-build-isolation 'transformer_engine[pytorch]'"
    if "error" in found:
        return Line(name, WARN, found["error"], f"built for this torch, or removed; {without}")
    if found:
        return Line(name, OK, found["version"])
    if has_gpus(facts):
        return Line(name, WARN, "not installed", f"Megatron's default layers are its own; {without}")
    return Line(name, OK, "not installed; a CPU cannot use it")


def _apex(facts: dict[str, Any]) -> Line:
    """NVIDIA's is told from PyPI's unrelated project of that name by its extensions and folders."""
    found = section(facts, "apex")
    if not found:
        if has_gpus(facts) and not section(facts, "te").get("version"):
            return Line("Apex", WARN, "not installed, nor Transformer Engine", f"{BUILD_APEX}; {WITHOUT_APEX}")
        return Line("Apex", OK, "not installed; nothing here needs it")
    what = f"{found['version'] or 'of unknown version'}, from {found['path']}"
    if not found["is_nvidia"]:
        advice = f"pip uninstall apex; then {BUILD_APEX}, {WITHOUT_APEX}"
        return Line("Apex", WARN, f"{what}: not NVIDIA's, but PyPI's unrelated project", advice)
    missing = [name for name, there in found["extensions"].items() if not there]
    if missing:
        return Line("Apex", WARN, f"{what}: NVIDIA's, without {' and '.join(missing)}", f"{BUILD_APEX}; {WITHOUT_APEX}")
    return Line("Apex", OK, f"{what}: NVIDIA's, with its CUDA extensions")


def _libraries(facts: dict[str, Any]) -> list[Line]:
    found = section(facts, "libraries")
    lines = [
        Line(name, OK, found[name]) if found[name] else Line(name, FAIL, "not installed", f"pip install {name}")
        for name in ("numpy", "PyYAML")
    ]
    missing = [name for name in OPTIONAL if not found[name]]
    lines.append(Line("also used", OK, ", ".join(f"{name} {found[name] or '(missing)'}" for name in OPTIONAL),
                      "; ".join(f"{name}: {OPTIONAL[name]}" for name in missing)))  # fmt: skip
    return [*lines, *_writers(found)]


def _writers(found: dict[str, Any]) -> list[Line]:
    """Megatron's training_log speaks to W&B only inside its `if writer`, the writer of TensorBoard."""
    rule = "give --tensorboard-dir with --wandb-project: without it Megatron logs nothing to W&B (training_log)"
    board, wandb = found["tensorboard"], found["wandb"]
    lines = [Line("TensorBoard", OK, board or "not installed; optional")]
    if wandb and not board:
        return [*lines, Line("W&B", WARN, wandb, f"pip install tensorboard, and {rule}")]
    return [*lines, Line("W&B", OK, wandb or "not installed; optional", rule if wandb else "")]
