"""Rules of bfpp doctor on environment, disks and network; each names the function that reads a variable."""

from collections.abc import Iterator

from .line import Facts, Line, fail, gpus, has_gpus, ok, section, warn

BLACKWELL = 10  # compute capability from which Megatron asks for no CUDA_DEVICE_MAX_CONNECTIONS
RECORD_STREAMS_IGNORED = (2, 8)  # since this torch ProcessGroupNCCL ignores the variable, with a warning
LEAST_SHM = 1 << 30
LEAST_DISK = 10 * 10**9  # a checkpoint of 0.7B parameters at Megatron's 14 bytes each
Environment = dict[str, str]
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment_lines(facts: Facts) -> list[Line]:
    """Judge environment, disks and network."""
    env = {name: str(value) for name, value in section(facts, "environment").items()}
    lines = [_connections(facts, env), _record_streams(facts, env), _allocator(env), _threads(facts, env)]
    lines += [_error_handling(env), *_nccl(facts, env), _launcher(facts, env)]
    return [*lines, *_disks(section(facts, "disk")), _hostname(facts, env), _loopback(section(facts, "network"))]


def _connections(facts: Facts, env: Environment) -> Line:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = env.get(name)
    found = "not set" if value is None else value
    if not gpus(facts):
        return ok(name, f"{found}; only GPUs read it")
    if min(device["capability"][0] for device in gpus(facts)) >= BLACKWELL:
        return ok(name, f"{found}; Blackwell GPUs need no value (validate_args)")
    rule = "1 where TP or CP is above 1, and not 1 with --use-torch-fsdp2: validate_args refuses the rest"
    return (ok if value in (None, "1") else warn)(name, found, rule)


def _record_streams(facts: Facts, env: Environment) -> Line:
    name = "TORCH_NCCL_AVOID_RECORD_STREAMS"
    if name not in env:
        return ok(name, "not set, as it should be")
    version = _release(section(facts, "torch").get("version", ""))
    if version is not None and version >= RECORD_STREAMS_IGNORED:
        return ok(name, f"{env[name]}; ignored since torch 2.8 (ProcessGroupNCCL)", "unset it: a warning less per rank")
    if env[name] in ("0", ""):
        return ok(name, env[name])
    return warn(name, env[name], "unset it: wrong losses with virtual stages were reported (Megatron-LM issue 1586)")


def _release(version: str) -> tuple[int, int] | None:
    parts = version.split(".")[:2]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else None


def _allocator(env: Environment) -> Line:
    set_names = [name for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in env]
    if not set_names:
        return ok("allocator", "neither PYTORCH_ALLOC_CONF nor PYTORCH_CUDA_ALLOC_CONF is set")
    found = ", ".join(f"{name}={env[name]}" for name in set_names)
    if not any("expandable_segments:True" in env[name] for name in set_names):
        return ok("allocator", found)
    rule = "CUDA graphs need NCCL_GRAPH_REGISTER=0 with it (cuda_graphs.py); --use-nccl-ub refuses it before torch 2.11"
    return ok("allocator", found, rule)


def _threads(facts: Facts, env: Environment) -> Line:
    name, cores = "OMP_NUM_THREADS", section(facts, "python").get("cores") or 1
    ranks = max(1, len(gpus(facts)))
    share, value = max(1, cores // ranks), env.get(name)
    if value is None:
        rule = f"torchrun sets 1; under srun alone set 1 to {share}, or each rank takes all {cores} cores"
        return ok(name, "not set", rule)
    if not value.isdecimal() or int(value) < 1:
        return warn(name, repr(value), f"a number from 1 to {share}, the cores of a rank")
    if int(value) > share:
        return warn(name, value, f"at most {share}: {cores} cores for {ranks} rank(s) on this node")
    return ok(name, value)


def _error_handling(env: Environment) -> Line:
    """Judge the variables that make a rank wait for ever for a dead one. ProcessGroupNCCL reads either name of each."""
    title = "NCCL watchdog"
    rule = "unset it (3 is ProcessGroupNCCL's default): ranks wait for ever for one that died"
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"):
        if env.get(name) == "0":
            return warn(title, f"{name}=0", rule)
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"):
        if env.get(name, "0") not in ("0", ""):
            return warn(title, f"{name}={env[name]}", "unset it: each wait() blocks the CPU, so that nothing overlaps")
    return ok(title, "on: neither switched off nor replaced by blocking waits")


def _nccl(facts: Facts, env: Environment) -> list[Line]:
    """Judge NCCL's own variables: those that close a way between ranks, names of interfaces, and list the others."""
    lines = []
    roads = {
        "NCCL_P2P_DISABLE": ("unset it: GPUs of a node then talk through host memory (ncclTopoCheckP2p)", True),
        "NCCL_SHM_DISABLE": ("unset it: ranks of a node then talk through the network (shmCanConnect)", True),
        "NCCL_IB_DISABLE": ("unset it: nodes then talk through TCP sockets (ncclIbInit)", _nodes(env) > 1),
    }
    for name, (rule, applies) in roads.items():
        if env.get(name, "0") not in ("0", "") and applies and has_gpus(facts):
            lines.append(warn(name, env[name], rule))
    interfaces = section(facts, "network").get("interfaces", [])
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if name in env and interfaces and not _names_one(name, env[name], interfaces):
            lines.append(fail(name, env[name], f"an interface of this machine: {', '.join(interfaces)}"))
    others = sorted(name for name in env if name.startswith("NCCL_") and name not in {line.name for line in lines})
    found = ", ".join(f"{name}={env[name]}" for name in others) or "none is set"
    return [*lines, ok("NCCL_*", found, "the same on every node, and in both arms of a comparison" if others else "")]


def _names_one(variable: str, value: str, interfaces: list[str]) -> bool:
    """Check for an interface. gloo takes names; NCCL beginnings, =names or ^exclusions (ncclFindInterfaces)."""
    if variable.startswith("GLOO"):
        return all(part in interfaces for part in value.split(","))
    if value.startswith("="):
        return any(part in interfaces for part in value[1:].split(","))
    return value.startswith("^") or any(each.startswith(part) for part in value.split(",") for each in interfaces)


def _nodes(env: Environment) -> int:
    text = env.get("SLURM_NNODES", env.get("SLURM_JOB_NUM_NODES", "1"))
    return int(text) if text.isdecimal() else 1


def _launcher(facts: Facts, env: Environment) -> Line:
    """Judge what torchrun and SLURM have left in the environment."""
    given = [name for name in _RANK_VARIABLES if name in env]
    missing = [name for name in _RANK_VARIABLES if name not in env]
    cards, ranks = len(gpus(facts)), env.get("LOCAL_WORLD_SIZE", "1")
    if given and missing:
        rule = "all of them, which torchrun sets, or none: Megatron and torch's env:// read them"
        return warn("launcher", f"{', '.join(given)} set without {', '.join(missing)}", rule)
    if cards and ranks.isdecimal() and int(ranks) > cards:
        rule = f"at most {cards} ranks per node: --device auto stops otherwise (choose_device)"
        return warn("launcher", f"{ranks} ranks on this node for {cards} GPUs", rule)
    names = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    slurm = ", ".join(f"{name}={env[name]}" for name in names if name in env)
    torchrun = f"rank {env['RANK']} of {env['WORLD_SIZE']}" if given else "not under torchrun"
    return ok("launcher", f"{torchrun}; {slurm or 'not under SLURM'}")


def _disks(disks: Facts) -> Iterator[Line]:
    for name, disk in disks.items():
        is_memory = name == "shared memory"
        if "error" in disk:
            found = f"{disk['path']}: {disk['error']}"
            yield ok(name, found) if is_memory else fail(name, found, "a folder that exists")
            continue
        found = f"{disk['path']}: {disk['free'] / 1e9:.1f} GB of {disk['total'] / 1e9:.1f} GB are free"
        rule = "10 GB or more: a checkpoint has 14 bytes per parameter"
        if is_memory:
            rule = "1 GiB or more (docker run --ipc=host or --shm-size), for NCCL (shmCanConnect) and data loaders"
        is_small = disk["free"] < (LEAST_SHM if is_memory else LEAST_DISK)
        yield warn(name, found, rule) if is_small else ok(name, found)


def _hostname(facts: Facts, env: Environment) -> Line:
    """Judge the host's name: gloo binds to its address, and without one to the loopback, which serves one node only."""
    network = section(facts, "network")
    addresses = network.get("addresses", [])
    found = f"{network['hostname']}: {', '.join(addresses) or network.get('error', 'no address')}"
    if "GLOO_SOCKET_IFNAME" in env or any(not each.startswith("127.") and each != "::1" for each in addresses):
        return ok("hostname", found)
    rule = "an address of the network, or GLOO_SOCKET_IFNAME: gloo otherwise binds to the loopback (ProcessGroupGloo)"
    return (fail if _nodes(env) > 1 else warn)("hostname", found, f"{rule}, which serves one node only")


def _loopback(network: Facts) -> Line:
    if network.get("loopback") is None:
        return ok("loopback", "two processes met at 127.0.0.1")
    found = f"two processes did not meet at 127.0.0.1: {network['loopback']}"
    return fail("loopback", found, "a firewall that lets the loopback through")
