"""Rules of bfpp doctor on environment, disks and network: each names the function that reads a variable, or its report."""

from __future__ import annotations

from typing import Any

from .line import FAIL, OK, WARN, Line, has_gpus, section

BLACKWELL = 10  # compute capability from which Megatron asks for no CUDA_DEVICE_MAX_CONNECTIONS
RECORD_STREAMS_IGNORED = (2, 8)  # torch from which ProcessGroupNCCL ignores the variable, and says so
LEAST_SHM = 1 << 30
LEAST_DISK = 10 * 10**9  # a checkpoint of 0.7B parameters at Megatron's 14 bytes each
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment_lines(facts: dict[str, Any]) -> list[Line]:
    env = {name: str(value) for name, value in section(facts, "environment").items()}
    lines = [_connections(facts, env), _record_streams(facts, env), _allocator(env), _threads(facts, env)]
    lines += [_error_handling(env), *_nccl(facts, env), _launcher(facts, env)]
    return [*lines, *_disks(section(facts, "disk")), _hostname(facts, env), _loopback(section(facts, "network"))]


def _connections(facts: dict[str, Any], env: dict[str, str]) -> Line:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = env.get(name)
    found = "not set" if value is None else value
    devices = section(facts, "torch").get("devices", [])
    if not devices:
        return Line(name, OK, f"{found}; only GPUs read it")
    if min(device["capability"][0] for device in devices) >= BLACKWELL:
        return Line(name, OK, f"{found}; Blackwell GPUs need no value (validate_args)")
    rule = "1 where TP or CP is above 1, and not 1 with --use-torch-fsdp2: validate_args refuses the rest"
    if value not in (None, "1"):
        return Line(name, WARN, found, rule)
    return Line(name, OK, found, rule)


def _record_streams(facts: dict[str, Any], env: dict[str, str]) -> Line:
    name = "TORCH_NCCL_AVOID_RECORD_STREAMS"
    if name not in env:
        return Line(name, OK, "not set, as it should be")
    version = _release(section(facts, "torch").get("version", ""))
    if version is not None and version >= RECORD_STREAMS_IGNORED:
        return Line(
            name, OK, f"{env[name]}; ignored since torch 2.8 (ProcessGroupNCCL)", "unset it: a warning less per rank"
        )
    if env[name] in ("0", ""):
        return Line(name, OK, env[name])
    return Line(
        name, WARN, env[name], "unset it: wrong losses with virtual stages were reported (Megatron-LM issue 1586)"
    )


def _release(version: str) -> tuple[int, int] | None:
    parts = version.split(".")[:2]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdigit() for part in parts) else None


def _allocator(env: dict[str, str]) -> Line:
    set_names = [name for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in env]
    if not set_names:
        return Line("allocator", OK, "neither PYTORCH_ALLOC_CONF nor PYTORCH_CUDA_ALLOC_CONF is set")
    found = ", ".join(f"{name}={env[name]}" for name in set_names)
    if not any("expandable_segments:True" in env[name] for name in set_names):
        return Line("allocator", OK, found)
    rule = "CUDA graphs need NCCL_GRAPH_REGISTER=0 with it (cuda_graphs.py); --use-nccl-ub refuses it before torch 2.11"
    return Line("allocator", OK, found, rule)


def _threads(facts: dict[str, Any], env: dict[str, str]) -> Line:
    name, cores = "OMP_NUM_THREADS", section(facts, "python").get("cores") or 1
    ranks = max(1, len(section(facts, "torch").get("devices", [])))
    share = max(1, cores // ranks)
    value = env.get(name)
    if value is None:
        rule = f"torchrun sets 1; under srun alone set 1 to {share}, or each rank takes all {cores} cores"
        return Line(name, OK, "not set", rule)
    if not value.isdecimal() or int(value) < 1:
        return Line(name, WARN, repr(value), f"a number from 1 to {share}, the cores of a rank")
    if int(value) > share:
        return Line(name, WARN, value, f"at most {share}: {cores} cores for {ranks} rank(s) on this node")
    return Line(name, OK, value)


def _error_handling(env: dict[str, str]) -> Line:
    """What makes a rank wait for ever for one that died. ProcessGroupNCCL reads either name of each."""
    title = "NCCL watchdog"
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"):
        if env.get(name) == "0":
            return Line(
                title,
                WARN,
                f"{name}=0",
                "unset it (3 is ProcessGroupNCCL's default): ranks wait for ever for one that died",
            )
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"):
        if env.get(name, "0") not in ("0", ""):
            return Line(
                title, WARN, f"{name}={env[name]}", "unset it: each wait() blocks the CPU, so that nothing overlaps"
            )
    return Line(title, OK, "on: neither switched off nor replaced by blocking waits")


def _nccl(facts: dict[str, Any], env: dict[str, str]) -> list[Line]:
    """What is set of NCCL's own variables, and those of them that take a road away."""
    lines = []
    nodes = _nodes(env)
    roads = {
        "NCCL_P2P_DISABLE": ("unset it: GPUs of a node then talk through host memory (ncclTopoCheckP2p)", True),
        "NCCL_SHM_DISABLE": ("unset it: ranks of a node then talk through the network (shmCanConnect)", True),
        "NCCL_IB_DISABLE": ("unset it: nodes then talk through TCP sockets (ncclIbInit)", nodes > 1),
    }
    for name, (rule, applies) in roads.items():
        if env.get(name, "0") not in ("0", "") and applies and has_gpus(facts):
            lines.append(Line(name, WARN, env[name], rule))
    interfaces = section(facts, "network").get("interfaces", [])
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if name in env and interfaces and not _names_one(name, env[name], interfaces):
            lines.append(Line(name, FAIL, env[name], f"an interface of this machine: {', '.join(interfaces)}"))
    others = sorted(name for name in env if name.startswith("NCCL_") and name not in {line.name for line in lines})
    found = ", ".join(f"{name}={env[name]}" for name in others) or "none is set"
    return [
        *lines,
        Line("NCCL_*", OK, found, "the same on every node, and in both arms of a comparison" if others else ""),
    ]


def _names_one(variable: str, value: str, interfaces: list[str]) -> bool:
    """gloo takes a name; NCCL a list of beginnings of names, =exact ones or ^exclusions (ncclFindInterfaces)."""
    if variable.startswith("GLOO"):
        return all(part in interfaces for part in value.split(","))
    if value.startswith("^"):
        return True
    if value.startswith("="):
        return any(part in interfaces for part in value[1:].split(","))
    return any(each.startswith(part) for part in value.split(",") for each in interfaces)


def _nodes(env: dict[str, str]) -> int:
    text = env.get("SLURM_NNODES", env.get("SLURM_JOB_NUM_NODES", "1"))
    return int(text) if text.isdecimal() else 1


def _launcher(facts: dict[str, Any], env: dict[str, str]) -> Line:
    """What torchrun and SLURM have left in the environment."""
    given = [name for name in _RANK_VARIABLES if name in env]
    missing = [name for name in _RANK_VARIABLES if name not in env]
    gpus = len(section(facts, "torch").get("devices", []))
    ranks = env.get("LOCAL_WORLD_SIZE", "1")
    if given and missing:
        rule = "all of them, which torchrun sets, or none: Megatron and torch's env:// read them"
        return Line("launcher", WARN, f"{', '.join(given)} set without {', '.join(missing)}", rule)
    if gpus and ranks.isdecimal() and int(ranks) > gpus:
        rule = f"at most {gpus} ranks per node: --device auto runs on the CPU otherwise (choose_device)"
        return Line("launcher", WARN, f"{ranks} ranks on this node for {gpus} GPUs", rule)
    names = ("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    slurm = ", ".join(f"{name}={env[name]}" for name in names if name in env)
    torchrun = f"rank {env['RANK']} of {env['WORLD_SIZE']}" if given else "not under torchrun"
    return Line("launcher", OK, f"{torchrun}; {slurm or 'not under SLURM'}")


def _disks(disks: dict[str, Any]) -> list[Line]:
    lines = []
    for name, disk in disks.items():
        if "error" in disk:
            status = OK if name == "shared memory" else FAIL
            lines.append(
                Line(name, status, f"{disk['path']}: {disk['error']}", "a folder that exists" if status == FAIL else "")
            )
            continue
        found = f"{disk['path']}: {disk['free'] / 1e9:.1f} GB of {disk['total'] / 1e9:.1f} GB are free"
        if name == "shared memory" and disk["free"] < LEAST_SHM:
            rule = "1 GiB or more (docker run --ipc=host or --shm-size): NCCL (shmCanConnect) and data loaders share memory there"
            lines.append(Line(name, WARN, found, rule))
        elif name != "shared memory" and disk["free"] < LEAST_DISK:
            lines.append(Line(name, WARN, found, "10 GB or more: a checkpoint has 14 bytes per parameter"))
        else:
            lines.append(Line(name, OK, found))
    return lines


def _hostname(facts: dict[str, Any], env: dict[str, str]) -> Line:
    """gloo binds to the address of the host's name, and without one to the loopback, where no other node comes."""
    network = section(facts, "network")
    addresses = network.get("addresses", [])
    found = f"{network['hostname']}: {', '.join(addresses) or network.get('error', 'no address')}"
    if "GLOO_SOCKET_IFNAME" in env or any(not _is_loopback(each) for each in addresses):
        return Line("hostname", OK, found)
    rule = "an address of the network, or GLOO_SOCKET_IFNAME: gloo otherwise binds to the loopback (ProcessGroupGloo)"
    return Line("hostname", FAIL if _nodes(env) > 1 else WARN, found, f"{rule}, which serves one node only")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _loopback(network: dict[str, Any]) -> Line:
    reason = network.get("loopback")
    if reason is None:
        return Line("loopback", OK, "two processes met at 127.0.0.1")
    return Line(
        "loopback",
        FAIL,
        f"two processes did not meet at 127.0.0.1: {reason}",
        "a firewall that lets the loopback through",
    )
