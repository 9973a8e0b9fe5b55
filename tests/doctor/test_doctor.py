"""bfpp doctor: its rules on machines that are described by data, its facts on this one, and one real equality run."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_bfpp
from megatron_bfpp.cli import main
from megatron_bfpp.compare.runs import Run, Step
from megatron_bfpp.doctor import facts as doctor_facts
from megatron_bfpp.doctor import trial as doctor_trial
from megatron_bfpp.doctor.line import Line
from megatron_bfpp.doctor.table import judged, summary, table

H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * 2**30, "driver": "550.54.15"}
SEEN = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * 2**30, "capability": [9, 0]}
GPU_NODE = {
    "python": {"version": [3, 12, 3], "executable": "/usr/bin/python", "system": "Linux", "cores": 192},
    "nvidia_smi": {"gpus": [H100] * 8},
    "torch": {
        "version": "2.9.0", "cuda": "12.8", "nccl": "2.27.3", "gloo": True, "devices": [SEEN] * 8,
        "architectures": ["sm_80", "sm_90", "compute_90"],
    },
    "megatron": {"version": "0.19.2", "path": "/opt/megatron/core", "training": True, "tested": True, "refusal": None},
    "te": {"version": "2.9"},
    "apex": {
        "version": "0.1", "path": "/opt/apex", "is_nvidia": True,
        "extensions": {"amp_C": True, "fused_weight_gradient_mlp_cuda": True},
    },
    "libraries": dict.fromkeys(doctor_facts.LIBRARIES, "1.0"),
    "environment": {"OMP_NUM_THREADS": "8", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    "disk": {
        "shared memory": {"path": "/dev/shm", "free": 10**12, "total": 10**12},
        "this folder": {"path": "/data", "free": 10**12, "total": 10**12},
    },
    "network": {"hostname": "node1", "addresses": ["10.0.0.1"], "interfaces": ["lo", "eth0", "ib0"], "loopback": None},
}  # fmt: skip


def changed(path: str, value) -> dict:
    """GPU_NODE with one fact replaced: "apex.is_nvidia"."""
    facts = copy.deepcopy(GPU_NODE)
    *sections, name = path.split(".")
    place = facts
    for section in sections:
        place = place[section]
    place[name] = value
    return facts


def test_nothing_is_wrong_with_a_good_gpu_node():
    lines = judged(GPU_NODE)
    assert [line for line in lines if line.status != "ok"] == []
    assert summary(lines) == "all is well"
    text = table(lines)
    assert "8 x NVIDIA H100 80GB HBM3, driver 550.54.15" in text and "2.27.3, of torch" in text
    assert "0.19.2, from /opt/megatron/core, with megatron.training" in text


def test_a_long_name_keeps_a_space_before_what_was_found():
    name = "seams of the entry point of hybrid models"
    assert table([Line(name, "ok", "4 of 4 fit")]) == f"ok    {name} 4 of 4 fit"


@pytest.mark.parametrize(
    "path, value, name, status, words",
    [
        ("python.version", [3, 10, 1], "Python", "fail", "Python 3.12 or newer"),
        ("torch.devices", [SEEN] * 4, "GPUs", "warn", "torch sees 4"),
        ("nvidia_smi.gpus", [H100] * 4 + [{**H100, "name": "NVIDIA A100"}] * 4, "GPUs", "warn", "one kind"),
        ("torch", {"error": "ImportError: libcudart.so.12"}, "torch", "fail", "libcudart"),
        ("torch", {}, "torch", "fail", "not installed"),
        ("torch.architectures", ["sm_100", "compute_100"], "torch", "fail", "compute capability 9.0"),
        ("torch.architectures", ["sm_80"], "torch", "fail", "only for sm_80"),
        ("torch.architectures", ["sm_90a"], "torch", "ok", "2.9.0"),
        ("torch.cuda", None, "CUDA", "fail", "a CUDA build of torch"),
        ("torch.nccl", None, "NCCL", "fail", "torch has none"),
        ("megatron", {}, "megatron-core", "fail", "megatron-core>=0.17"),
        ("megatron.refusal", "megatron-core 0.16.1 is not supported", "megatron-core", "fail", "is not supported"),
        ("megatron.tested", False, "megatron-core", "ok", "not a tested release"),
        ("megatron.training", False, "megatron-core", "warn", "without megatron.training"),
        ("te", {}, "Transformer Engine", "warn", "--transformer-impl local"),
        ("te", {"error": "OSError: undefined symbol"}, "Transformer Engine", "warn", "undefined symbol"),
        ("apex.is_nvidia", False, "Apex", "warn", "PyPI's unrelated project"),
        (
            "apex.extensions",
            {"amp_C": True, "fused_weight_gradient_mlp_cuda": False},
            "Apex",
            "warn",
            "without fused_weight",
        ),
        ("libraries.tensorboard", None, "W&B", "warn", "training_log"),
        ("libraries.numpy", None, "numpy", "fail", "pip install numpy"),
        ("environment.CUDA_DEVICE_MAX_CONNECTIONS", "8", "CUDA_DEVICE_MAX_CONNECTIONS", "warn", "validate_args"),
        ("environment.TORCH_NCCL_AVOID_RECORD_STREAMS", "1", "TORCH_NCCL_AVOID_RECORD_STREAMS", "ok", "ignored since"),
        ("environment.PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "allocator", "ok", "NCCL_GRAPH_REGISTER=0"),
        ("environment.OMP_NUM_THREADS", "64", "OMP_NUM_THREADS", "warn", "at most 24"),
        ("environment.OMP_NUM_THREADS", "many", "OMP_NUM_THREADS", "warn", "from 1 to 24"),
        ("environment.TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", "NCCL watchdog", "warn", "wait for ever"),
        ("environment.NCCL_BLOCKING_WAIT", "1", "NCCL watchdog", "warn", "blocks the CPU"),
        ("environment.NCCL_P2P_DISABLE", "1", "NCCL_P2P_DISABLE", "warn", "ncclTopoCheckP2p"),
        ("environment.NCCL_SOCKET_IFNAME", "eth", "NCCL_*", "ok", "NCCL_SOCKET_IFNAME=eth"),
        ("environment.NCCL_SOCKET_IFNAME", "=eth", "NCCL_SOCKET_IFNAME", "fail", "lo, eth0, ib0"),
        ("environment.GLOO_SOCKET_IFNAME", "eth", "GLOO_SOCKET_IFNAME", "fail", "lo, eth0, ib0"),
        ("environment.RANK", "0", "launcher", "warn", "without WORLD_SIZE"),
        ("environment.LOCAL_WORLD_SIZE", "16", "launcher", "warn", "at most 8 ranks per node"),
        ("disk.shared memory.free", 64 * 2**20, "shared memory", "warn", "--shm-size"),
        ("disk.this folder.free", 10**9, "this folder", "warn", "14 bytes per parameter"),
        ("network.addresses", ["127.0.1.1"], "hostname", "warn", "GLOO_SOCKET_IFNAME"),
        ("network.loopback", "timed out", "loopback", "fail", "timed out"),
    ],
)
def test_one_wrong_fact_is_reported_with_its_remedy(path, value, name, status, words):
    line = next(line for line in judged(changed(path, value)) if line.name == name)
    assert line.status == status
    assert words in f"{line.found} {line.advice}"
    assert line.status == "ok" or line.advice


def test_gpus_that_torch_cannot_use_fail_with_torchs_reason():
    facts = changed("torch.devices", [])
    facts["torch"]["cuda_error"] = "The NVIDIA driver on your system is too old (found version 11040)."
    line = next(line for line in judged(facts) if line.name == "GPUs")
    assert line.status == "fail" and "driver on your system is too old" in line.advice
    facts["environment"]["CUDA_VISIBLE_DEVICES"] = ""
    assert next(line for line in judged(facts) if line.name == "GPUs").status == "warn"


def test_rules_that_depend_on_two_facts():
    old = changed("torch.version", "2.7.1")
    old["environment"]["TORCH_NCCL_AVOID_RECORD_STREAMS"] = "1"
    assert next(line for line in judged(old) if line.name == "TORCH_NCCL_AVOID_RECORD_STREAMS").status == "warn"
    blackwell = changed("torch.devices", [{**SEEN, "capability": [10, 0]}])
    blackwell["environment"]["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    assert next(line for line in judged(blackwell) if line.name == "CUDA_DEVICE_MAX_CONNECTIONS").status == "ok"
    nodes = changed("environment.SLURM_NNODES", "2")
    nodes["environment"]["NCCL_IB_DISABLE"] = "1"
    nodes["network"]["addresses"] = []
    found = {line.name: line.status for line in judged(nodes)}
    assert found["NCCL_IB_DISABLE"] == "warn" and found["hostname"] == "fail"
    bare = changed("te", {})
    bare["apex"] = {}
    line = next(line for line in judged(bare) if line.name == "Apex")
    assert line.status == "warn" and "--no-gradient-accumulation-fusion" in line.advice and "--cuda_ext" in line.advice


def test_nvidia_smi_is_read_with_commas_in_names_and_without_memory():
    assert doctor_facts.parse_gpus("NVIDIA H100 80GB HBM3, 81559, 550.54.15\nA, B, [N/A], 580.1\n\nno GPU\n") == [
        {"name": "NVIDIA H100 80GB HBM3", "memory": 81559 * 2**20, "driver": "550.54.15"},
        {"name": "A, B", "memory": None, "driver": "580.1"},
    ]


@pytest.mark.parametrize(
    "files, is_nvidia, extension",
    [
        (["apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "amp_C.py"], True, True),
        (["apex/__init__.py", "apex/multi_tensor_apply/__init__.py"], True, False),
        (["apex/__init__.py", "apex/models.py"], False, False),  # as PyPI's apex 0.9.10dev
    ],
)
def test_nvidias_apex_is_not_taken_for_pypis(files, is_nvidia, extension, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = doctor_facts._apex()
    assert (found["is_nvidia"], found["extensions"]["amp_C"]) == (is_nvidia, extension)


def test_a_library_that_ends_its_process_is_an_answer(tmp_path, monkeypatch):
    (tmp_path / "transformer_engine.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "ended the process with code 7" in doctor_facts.probe("te", "transformer_engine")["error"]
    (tmp_path / "transformer_engine.py").write_text("print('hello')\nraise OSError('undefined symbol')\n")
    assert doctor_facts.probe("te", "transformer_engine") == {"error": "OSError: undefined symbol"}


def test_without_torch_and_megatron_the_table_reports_it(tmp_path):
    # -I -S: no site-packages, as in a Python in which nothing was installed.
    root = str(Path(megatron_bfpp.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from megatron_bfpp.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-I", "-S", "-c", code, "doctor", "--json", str(tmp_path / "doctor.json")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == ""
    content = json.loads((tmp_path / "doctor.json").read_text())
    found = {line["name"]: line for line in content["lines"]}
    assert {found[name]["status"] for name in ("torch", "megatron-core", "numpy", "equality run")} == {"fail"}
    assert "not started for want of torch and megatron-core" in found["equality run"]["found"]
    assert found["Python"]["status"] == "ok" and content["trial"] is None


def _run(values: dict, steps: int = doctor_trial.STEPS) -> Run:
    listed = [Step(number, number - 1, {**values, "step": number}) for number in range(1, steps + 1)]
    return Run(Path("run"), {"name": "run"}, listed, {"status": "finished"}, [])


def test_the_verdict_needs_every_step_and_every_bit():
    values = {"lm loss": 1.5, "lm loss hex": (1.5).hex(), "grad norm": 2.0, "grad norm hex": (2.0).hex()}
    assert doctor_trial.verdict(_run(values), _run(values)) == ""
    last_bit = {**values, "lm loss hex": (1.5 + 2**-52).hex()}
    assert "lm loss differs from step 1" in doctor_trial.verdict(_run(values), _run(last_bit))
    norm = {**values, "grad norm hex": (2.5).hex()}
    assert "grad norm differs" in doctor_trial.verdict(_run(values), _run(norm))
    assert "3 of 4 steps" in doctor_trial.verdict(_run(values), _run(values, 3))
    assert "not all written" in doctor_trial.verdict(_run({"lm loss": 1.5}), _run({"lm loss": 1.5}))
    assert "not all written" in doctor_trial.verdict(_run({}), _run({}))


@pytest.mark.slow
def test_the_equality_run_on_this_machine(tmp_path, capsys):
    pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(path)]) == 0, capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["trial"]["is_equal"] and len(content["trial"]["losses"]) == doctor_trial.STEPS
    assert content["trial"]["losses"][-1] < content["trial"]["losses"][0] and not content["trial"]["log_folder"]
    assert "breadth-first computes the bits of interleaved" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_an_arm_that_fails_is_reported_with_its_first_error(monkeypatch):
    pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
    monkeypatch.setitem(doctor_trial.ARMS, "interleaved", ["--breadth-first-group-size", "0"])
    trial = doctor_trial.run_trial("cpu", lambda arm, steps: None)
    assert not trial.is_equal and "interleaved: rank" in trial.reason and "--breadth-first-group-size" in trial.reason
    assert Path(trial.log_folder, "interleaved.rank0.log").is_file()
    for path in sorted(Path(trial.log_folder).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    Path(trial.log_folder).rmdir()
