"""Rules of bfpp doctor on what is installed: each names the function of Megatron or of torch that it comes from."""

from .line import Facts, Line, fail, has_gpus, ok, section, warn

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


def software_lines(facts: Facts) -> list[Line]:
    """Judge Python, GPUs, torch, Megatron and libraries."""
    lines = [_python(section(facts, "python")), _gpus(facts), _torch(facts)]
    if section(facts, "torch").get("version"):
        lines += [_cuda(facts), _nccl(facts)]
    return [*lines, _megatron(section(facts, "megatron")), _te(facts), _apex(facts), *_libraries(facts)]


def _python(found: Facts) -> Line:
    version = ".".join(map(str, found["version"]))
    what = f"{version}, {found['executable']}, {found['cores']} cores"
    if tuple(found["version"][:2]) < PYTHON:
        return fail("Python", what, "Python 3.12 or newer, which megatron-core 0.19 asks for too")
    return ok("Python", what)


def _gpus(facts: Facts) -> Line:
    """Judge the GPUs of the driver beside those that torch sees."""
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
            return warn("GPUs", what, f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it, or it is meant")
        if driver and not seen:
            reason = torch.get("cuda_error") or "torch gives no reason"
            return fail("GPUs", what, f"{reason.rstrip('.')}: a torch whose CUDA this driver runs (see CUDA below)")
        if driver:
            return warn("GPUs", what, "all of them in this job's allocation: torch and the driver disagree")
    if len(kinds) > 1:
        return warn("GPUs", what, "one kind: a pipeline runs at the speed of its slowest rank")
    if not names:
        return ok("GPUs", f"{what}; jobs run on the CPU over gloo, for trying and testing")
    return ok("GPUs", what)


def _torch(facts: Facts) -> Line:
    torch = section(facts, "torch")
    if not torch:
        return fail("torch", "not installed", "the torch of your container, or pip install torch")
    if "error" in torch:
        return fail("torch", torch["error"], "a torch that imports: every job needs it")
    missing = _without_kernels(torch)
    if missing:
        found = f"{torch['version']} has no code for {missing}, only for {' '.join(torch['architectures'])}"
        return fail("torch", found, "a build of torch for this GPU (torch.cuda._check_capability warns of the same)")
    return ok("torch", torch["version"])


def _without_kernels(torch: Facts) -> str:
    """Return the first GPU for which this torch was not built, or "". sm_X runs on X and above of the same major."""
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


def _cuda(facts: Facts) -> Line:
    torch, smi = section(facts, "torch"), section(facts, "nvidia_smi")
    if torch["cuda"] is None:
        found = "torch was built without"
        return fail("CUDA", found, "a CUDA build of torch") if smi.get("gpus") else ok("CUDA", found)
    return ok("CUDA", f"{torch['cuda']}, of torch")


def _nccl(facts: Facts) -> Line:
    torch = section(facts, "torch")
    if torch["nccl"] is None:
        advice = "a torch with NCCL: --distributed-backend nccl, Megatron's default, needs it"
        return fail("NCCL", "torch has none", advice) if has_gpus(facts) else ok("NCCL", "torch has none")
    return ok("NCCL", f"{torch['nccl']}, of torch")


def _megatron(found: Facts) -> Line:
    install = "pip install --no-deps 'megatron-core>=0.17', or a Megatron-LM checkout on PYTHONPATH"
    if not found:
        return fail("megatron-core", "not installed", install)
    if "error" in found:
        return fail("megatron-core", found["error"], f"one that imports: {install}")
    what = f"{found['version']}, from {found['path']}" + ("" if found["tested"] else ", not a tested release")
    if found["refusal"]:
        return fail("megatron-core", what, found["refusal"])
    if not found["training"]:
        rule = "enough for megatron_bfpp.enable('breadth-first'); the flag needs one with megatron.training"
        return warn("megatron-core", f"{what}, without megatron.training", rule)
    return ok("megatron-core", f"{what}, with megatron.training")


def _te(facts: Facts) -> Line:
    name, found = "Transformer Engine", section(facts, "te")
    without = "train with --transformer-impl local, or pip install --no-build-isolation 'transformer_engine[pytorch]'"
    if "error" in found:
        return warn(name, found["error"], f"built for this torch, or removed; {without}")
    if found:
        return ok(name, found["version"])
    if has_gpus(facts):
        return warn(name, "not installed", f"Megatron's default layers are its own; {without}")
    return ok(name, "not installed; a CPU cannot use it")


def _apex(facts: Facts) -> Line:
    """Judge Apex. PyPI's unrelated project of that name has neither the extensions nor the folders of NVIDIA's."""
    found = section(facts, "apex")
    if not found:
        if has_gpus(facts) and not section(facts, "te").get("version"):
            return warn("Apex", "not installed, nor Transformer Engine", f"{BUILD_APEX}; {WITHOUT_APEX}")
        return ok("Apex", "not installed; nothing here needs it")
    what = f"{found['version'] or 'of unknown version'}, from {found['path']}"
    if not found["is_nvidia"]:
        advice = f"pip uninstall apex; then {BUILD_APEX}, {WITHOUT_APEX}"
        return warn("Apex", f"{what}: not NVIDIA's, but PyPI's unrelated project", advice)
    missing = [name for name, there in found["extensions"].items() if not there]
    if missing:
        return warn("Apex", f"{what}: NVIDIA's, without {' and '.join(missing)}", f"{BUILD_APEX}; {WITHOUT_APEX}")
    return ok("Apex", f"{what}: NVIDIA's, with its CUDA extensions")


def _libraries(facts: Facts) -> list[Line]:
    found = section(facts, "libraries")
    lines = [
        ok(name, found[name]) if found[name] else fail(name, "not installed", f"pip install {name}")
        for name in ("numpy", "PyYAML")
    ]
    missing = [name for name in OPTIONAL if not found[name]]
    also = ", ".join(f"{name} {found[name] or '(missing)'}" for name in OPTIONAL)
    advice = "; ".join(f"{name}: {OPTIONAL[name]}" for name in missing)
    return [*lines, ok("also used", also, advice), *_writers(found)]


def _writers(found: Facts) -> list[Line]:
    """Judge TensorBoard and W&B: training_log writes to W&B only inside its `if writer`, the writer of TensorBoard."""
    rule = "give --tensorboard-dir with --wandb-project: without it Megatron logs nothing to W&B (training_log)"
    board, wandb = found["tensorboard"], found["wandb"]
    lines = [ok("TensorBoard", board or "not installed; optional")]
    if wandb and not board:
        return [*lines, warn("W&B", wandb, f"pip install tensorboard, and {rule}")]
    return [*lines, ok("W&B", wandb or "not installed; optional", rule if wandb else "")]
