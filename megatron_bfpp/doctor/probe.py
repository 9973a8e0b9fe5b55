"""python -m megatron_bfpp.doctor.probe {torch,megatron,te}: import a library and describe it as a last line of JSON.

It runs in a process of its own: a library whose parts do not fit each other may end the process that imports it.
A failed import is an answer: {"error": "ImportError: ..."}.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any


def torch_facts() -> dict[str, Any]:
    """Describe torch and its GPUs; memory in bytes."""
    import torch

    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": [], "nccl": None}
    if torch.distributed.is_available() and torch.distributed.is_nccl_available() and torch.version.cuda:
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    facts["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    facts["architectures"] = torch.cuda.get_arch_list()
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # no driver, a driver too old, a build without CUDA
        facts["cuda_error"] = _first_line(error)
        return facts
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts["devices"].append(
            {"name": device.name, "memory": device.total_memory, "capability": [device.major, device.minor]}
        )
    return facts


def megatron_facts() -> dict[str, Any]:
    """Describe Megatron. "refusal": the reason for which enable() refuses this release, None if it does not.

    "seams": what the plugin relies on, by what needs it; each with what has changed there, None where it fits.
    """
    from ..console.errors import UserError
    from ..integration import relied_on

    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        return {}
    facts: dict[str, Any] = {"path": _place("megatron.core"), "refusal": None}
    # Behind a + stands the commit of the folder in which this process was started, whatever that is.
    facts["version"] = importlib.import_module("megatron.core.package_info").__version__.partition("+")[0]
    facts["training"] = importlib.util.find_spec("megatron.training") is not None
    facts["training_path"] = _place("megatron.training") if facts["training"] else None
    try:
        relied_on.check_release()
    except UserError as error:
        facts["refusal"] = _first_line(error)
    facts["tested"] = relied_on.is_tested()
    if facts["training"]:
        importlib.import_module("megatron.training.training")
    facts["seams"] = [
        {
            "needed_by": part.name, "place": seam.path, "why": seam.why, "misfit": misfit,
            "remedy": relied_on.remedy(part, seam), "is_optional": bool(part.instead),
        }
        for part, seam, misfit in relied_on.answers()
        if facts["training"] or part.is_core
    ]  # fmt: skip
    return facts


def te_facts() -> dict[str, Any]:
    """Describe Transformer Engine."""
    module = importlib.import_module("transformer_engine")
    importlib.import_module("transformer_engine.pytorch")
    return {"version": getattr(module, "__version__", "unknown")}


def _place(package: str) -> str:
    spec = importlib.util.find_spec(package)
    return "" if spec is None or not spec.submodule_search_locations else next(iter(spec.submodule_search_locations))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


PROBES: dict[str, Callable[[], dict[str, Any]]] = {"torch": torch_facts, "megatron": megatron_facts, "te": te_facts}


def main(name: str) -> None:
    """Print the facts of a library."""
    try:
        facts = PROBES[name]()
    except (ImportError, OSError, RuntimeError) as error:  # any other is a traceback, whose last line the reader shows
        facts = {"error": f"{type(error).__name__}: {_first_line(error)}"}
    print("\n" + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
