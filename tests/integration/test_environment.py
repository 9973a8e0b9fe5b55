"""BFPP_PIPELINE_SCHEDULE: who reads it, what counts more, and that nothing is imported for it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import megatron_bfpp
from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration import process
from megatron_bfpp.integration.flags.settings import TIMEOUT_VARIABLE, VARIABLE, settings_of, timeout_of
from megatron_bfpp.integration.reliability import watch
from megatron_bfpp.run import RAY_HOOK, SETUP_HOOK, ray_runtime_env

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"BFPP_DEVICE": "cpu", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=cwd
    )


def test_the_argument_counts_more_than_the_flag_and_the_flag_more_than_the_variable(monkeypatch):
    none, flag = SimpleNamespace(), SimpleNamespace(pipeline_schedule="1f1b")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert settings_of(None).schedule == settings_of(none).schedule == "1f1b"
    monkeypatch.setenv(VARIABLE, "breadth-first")
    assert settings_of(None).schedule == settings_of(none).schedule == "breadth-first"
    assert settings_of(flag).schedule == "1f1b"
    assert settings_of(flag, "breadth-first").schedule == "breadth-first"
    monkeypatch.setattr(process, "megatron_args", lambda: flag)
    assert process.settings().schedule == "1f1b"
    monkeypatch.setattr(process, "explicit_schedule", "breadth-first")
    assert process.settings().schedule == "breadth-first"


def test_the_watchdogs_time_is_the_flags_then_the_variables(monkeypatch):
    none, flag = SimpleNamespace(distributed_timeout_minutes=10), SimpleNamespace(bfpp_timeout_seconds=30.0)
    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    assert timeout_of(None) == 0 and timeout_of(none) == 480
    monkeypatch.setenv(TIMEOUT_VARIABLE, "90")
    assert timeout_of(None) == timeout_of(none) == 90 and timeout_of(flag) == 30
    for wrong in ("soon", "-1", "0.5", "inf", "nan"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, wrong)
        with pytest.raises(UserError, match=f"BFPP_TIMEOUT_SECONDS is {wrong}; it is the time that an action"):
            timeout_of(None)


def test_an_unknown_schedule_in_the_environment_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "breadth")
    message = "BFPP_PIPELINE_SCHEDULE=breadth does not exist.\n  Use BFPP_PIPELINE_SCHEDULE=1f1b or breadth-first."
    for call in (megatron_bfpp.enable, megatron_bfpp.enable_from_environment, lambda: settings_of(None)):
        with pytest.raises(UserError) as refusal:
            call()
        assert str(refusal.value) == message
    (tmp_path / "train.py").write_text("print('it runs')")
    done = run("-m", "megatron_bfpp.run", "train.py", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and "breadth does not exist" in done.stderr


def test_pipelines_without_chunks_are_refused_and_with_enable_left_to_megatron(monkeypatch, capsys):
    monkeypatch.setattr(process, "explicit_schedule", None)
    with pytest.raises(
        UserError, match=r"at least 2 model chunks per rank, but there are 1 on each of 4 .*\n  Set virt"
    ):
        watch._refuse_or_warn("there are 1 on each of 4 pipeline ranks", 0)
    monkeypatch.setattr(process, "explicit_schedule", "breadth-first")
    watch._refuse_or_warn("there are 1 on each of 4 pipeline ranks", 0)
    assert (
        "WARNING: breadth-first needs at least 2 model chunks per rank, but there are 1 on" in capsys.readouterr().out
    )
    watch._refuse_or_warn("there are 1 on each of 4 pipeline ranks", 1)
    assert not capsys.readouterr().out


def test_what_the_workers_of_ray_get(monkeypatch):
    for name in [name for name in os.environ if name.startswith("BFPP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(VARIABLE, "breadth-first")
    monkeypatch.setenv("BFPP_RUN_DIR", "runs/1")
    own = {VARIABLE: "breadth-first", "BFPP_RUN_DIR": "runs/1"}
    assert ray_runtime_env(None) == {"worker_process_setup_hook": SETUP_HOOK, "env_vars": own}
    given = {"working_dir": ".", "env_vars": {"A": "1", "BFPP_RUN_DIR": "runs/2"}}
    found = ray_runtime_env(given)
    assert found["working_dir"] == "." and found["env_vars"] == own | given["env_vars"]
    assert given == {"working_dir": ".", "env_vars": {"A": "1", "BFPP_RUN_DIR": "runs/2"}}
    assert ray_runtime_env(found) == found
    with pytest.raises(UserError, match=r"has the worker_process_setup_hook verl\.hook already"):
        ray_runtime_env({"worker_process_setup_hook": "verl.hook"})
    assert callable(getattr(megatron_bfpp, SETUP_HOOK.partition(".")[2]))


@pytest.mark.parametrize("as_module", [True, False])
def test_the_launcher_runs_a_module_or_script_as_python_does_and_imports_nothing(as_module, tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "beside.py").write_text("")
    (tmp_path / "trainer" / "main.py").write_text(
        "import os, sys\n"
        + ("from . import beside\n" if as_module else "import beside\n")
        + "print(__name__, sys.argv[1:], sys.argv[0].endswith('main.py'), os.environ.get('RAY_RUNTIME_ENV_HOOK'))\n"
        "print([name for name in ('torch', 'megatron') if name in sys.modules])\n"
    )
    script = ["-m", "trainer.main"] if as_module else ["trainer/main.py"]
    variables = {VARIABLE: "breadth-first"}
    done = run("-m", "megatron_bfpp.run", *script, "a", "--device", "b", cwd=tmp_path, **variables)
    hook = "megatron_bfpp.run.ray_runtime_env"
    assert done.stdout.splitlines() == [f"__main__ ['a', '--device', 'b'] True {hook}", "[]"], done.stderr[-2000:]
    other = run("-m", "megatron_bfpp.run", *script, cwd=tmp_path, **variables, **{RAY_HOOK: "their.hook"})
    assert "their.hook" in other.stdout and "follow the variable only if it calls" in other.stderr
    assert run("-m", "megatron_bfpp.run", "-m", cwd=tmp_path).returncode == 2


@pytest.mark.slow
def test_a_process_is_enabled_once_megatron_has_been_imported_whatever_is_imported_first():
    code = """
import sys
import megatron_bfpp
megatron_bfpp.enable_from_environment()
assert "torch" not in sys.modules and "megatron" not in sys.modules
finders = len(sys.meta_path)
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules  # as a trainer does
ours = get_forward_backward_func(pp_size=4, vp_size=2)
assert hasattr(ours, "__wrapped__"), "breadth-first"
assert "megatron.training" not in sys.modules, "nobody has asked for it"
from megatron_bfpp.integration import process, seams
from megatron_bfpp.integration.activation import VALIDATE_ARGS
assert process.settings().schedule == "breadth-first" and not seams.is_applied(VALIDATE_ARGS)
from megatron.training.arguments import parse_args, validate_args
assert seams.is_applied(VALIDATE_ARGS) and hasattr(validate_args, "__wrapped__"), "bound by name, later"
sys.argv = ["train.py", "--num-layers", "8"]
assert parse_args().pipeline_schedule == "breadth-first"
sys.argv += ["--pipeline-schedule", "1f1b"]
assert parse_args().pipeline_schedule == "1f1b"
for schedule in ("1f1b", "breadth-first"):
    megatron_bfpp.enable(schedule)
    assert process.settings().schedule == schedule, "the last call of enable() counts"
assert get_forward_backward_func(pp_size=4, vp_size=2) is ours
import inspect
assert inspect.getsource(schedules).startswith("#") and schedules.__spec__.loader is schedules.__loader__
megatron_bfpp.disable()
assert get_forward_backward_func(pp_size=4, vp_size=2) is ours.__wrapped__ and process.explicit_schedule is None
assert len(sys.meta_path) == finders - 1, "the finder is gone"
import megatron.training.arguments as arguments
assert not hasattr(arguments.validate_args, "__wrapped__")
print("shown")
"""
    done = run("-c", code, **{VARIABLE: "breadth-first"})
    assert done.stdout.strip().endswith("shown"), done.stderr[-3000:]


@pytest.mark.slow
def test_what_enable_refuses_every_import_of_megatron_refuses():
    code = """
import megatron_bfpp
megatron_bfpp.enable_from_environment()
for _ in range(2):  # as a trainer that tries an optional import
    try:
        from megatron.core.pipeline_parallel import get_forward_backward_func
        print("imported")
    except megatron_bfpp.console.errors.UserError as error:
        print(error)
from megatron.core.pipeline_parallel import get_forward_backward_func
"""
    done = run("-c", code, **{VARIABLE: "breadth-first", "BFPP_DEVICE": "tpu"})
    assert done.returncode == 1 and "imported" not in done.stdout
    assert done.stdout.count("BFPP_DEVICE=tpu does not exist") == 2
    assert "UserError: BFPP_DEVICE=tpu does not exist" in done.stderr.strip().splitlines()[-2], done.stderr[-3000:]
