"""The facts of bfpp doctor about this machine, as data, without a rule; neither torch nor Megatron is imported.

Sizes are in bytes. The "error" of a fact is the reason why it is missing.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..console.processes import package_on_path

PROBE_S = 180.0  # an import of Megatron takes 8 s alone, and minutes from a network file system that is asked by all
LIBRARIES = ("numpy", "PyYAML", "psutil", "einops", "wandb", "tensorboard", "matplotlib", "scipy")
VARIABLES = (
    *("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "GLOO_SOCKET_IFNAME", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    *("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
PREFIXES = ("NCCL_", "TORCH_NCCL_", "NVTE_", "SLURM_")
_CONNECT = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 20).sendall(b'bfpp')"


def gather(on_part: Callable[[str], None]) -> dict[str, Any]:
    """Gather all facts; on_part is called with the name of each part before its turn."""
    parts: dict[str, Callable[[], Any]] = {
        "python": _python, "nvidia_smi": _nvidia_smi, "torch": partial(probe, "torch", "torch"),
        "megatron": partial(probe, "megatron", "megatron"), "te": partial(probe, "te", "transformer_engine"),
        "apex": _apex, "libraries": lambda: {name: _version(name) for name in LIBRARIES},
        "environment": _environment, "disk": _disk, "network": _network,
    }  # fmt: skip
    found = {}
    for name, part in parts.items():
        on_part(name)
        found[name] = part()
    return found


def probe(name: str, module: str) -> dict[str, Any]:
    """Return the answer of doctor/probe.py about a library; {} where it is not installed."""
    if importlib.util.find_spec(module) is None:
        return {}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_bfpp.doctor.probe", name]
    environment = {**os.environ, "PYTHONPATH": package_on_path()}
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PROBE_S, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"its import did not end within {PROBE_S:.0f} s"}
    try:
        found = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        return {"error": f"its import ended the process with code {done.returncode}: {last}"}
    return found if isinstance(found, dict) else {"error": f"its import printed {done.stdout[-80:]!r} last"}


def _python() -> dict[str, Any]:
    version = list(sys.version_info[:3])
    return {"version": version, "executable": sys.executable, "system": platform.platform(), "cores": os.cpu_count()}


def _nvidia_smi() -> dict[str, Any]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"gpus": [], "error": "nvidia-smi is not on the PATH"}
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"gpus": [], "error": f"nvidia-smi: {error}"}
    if done.returncode != 0:
        last = ((done.stdout + done.stderr).strip().splitlines() or ["no output"])[-1]
        return {"gpus": [], "error": f"nvidia-smi ended with {done.returncode}: {last}"}
    return {"gpus": parse_gpus(done.stdout)}


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Parse the output of the query above; memory is in MiB there, and in bytes here."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 2)]
        if len(fields) == 3 and fields[0]:
            memory = int(fields[1]) * 2**20 if fields[1].isdigit() else None  # "[N/A]" where memory is shared
            gpus.append({"name": fields[0], "memory": memory, "driver": fields[2]})
    return gpus


def _apex() -> dict[str, Any]:
    """Describe Apex without its import: its extensions need torch's libraries loaded first."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return {}
    places = [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.origin else [])]
    extensions = ("amp_C", "fused_weight_gradient_mlp_cuda")  # of --cpp_ext --cuda_ext
    found = {name: importlib.util.find_spec(name) is not None for name in extensions}
    return {
        "version": _version("apex"),
        "path": places[0] if places else "",
        "extensions": found,
        # The other project of this name does not have this folder of NVIDIA's.
        "is_nvidia": any(found.values()) or any(Path(place, "multi_tensor_apply").is_dir() for place in places),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in VARIABLES or name.startswith(PREFIXES)}


def _disk() -> dict[str, dict[str, Any]]:
    places = {"shared memory": "/dev/shm", "temporary files": tempfile.gettempdir(), "this folder": os.getcwd()}
    found: dict[str, dict[str, Any]] = {}
    for name, path in places.items():
        try:
            usage = shutil.disk_usage(path)
        except OSError as error:
            found[name] = {"path": path, "error": error.strerror}
        else:
            found[name] = {"path": path, "free": usage.free, "total": usage.total}
    return found


def _network() -> dict[str, Any]:
    found: dict[str, Any] = {"hostname": socket.gethostname(), "addresses": []}
    found["interfaces"] = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    try:
        answers = socket.getaddrinfo(found["hostname"], None)
        found["addresses"] = sorted({str(answer[4][0]) for answer in answers})
    except OSError as error:
        found["error"] = error.strerror
    found["loopback"] = _meet()
    return found


def _meet() -> str | None:
    """Return why a second process could not send to this one over 127.0.0.1; None if it could."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(30)
            port = str(server.getsockname()[1])
            with subprocess.Popen([sys.executable, "-c", _CONNECT, port], stderr=subprocess.DEVNULL) as other:
                try:
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(30)
                        return None if connection.recv(4) == b"bfpp" else "the other process sent nothing"
                finally:
                    other.kill()
    except OSError as error:
        return str(error)
