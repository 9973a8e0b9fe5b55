"""Run all tests against several releases of megatron-core and torch: nox [-s NAME...] [-- PYTEST ARGS].

    nox                                        megatron-core 0.17.1, 0.18.2 and 0.19.2, with the pinned torch
    nox -s "megatron(0.18.2)" -- -x -k equality   one release, some tests
    nox -s torch                               other releases of torch, with the pinned megatron-core
    MEGATRON_LM=/path/to/checkout nox -s main  a checkout of Megatron-LM, such as main
    nox --list

scripts/setup_env.sh makes the environments, so the pins stay in constraints.txt: .venv for what is pinned, else
.venv-RELEASE or .venv-torch-RELEASE (about 5.5 GB each).
"""

import os
from pathlib import Path

import nox

MEGATRON = ("0.17.1", "0.18.2", "0.19.2")
TORCH = ("2.13.0", "2.14.1", "2.15.0")

nox.options.sessions = ["megatron"]
nox.options.default_venv_backend = "none"
ROOT = Path(__file__).parent
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
)


def run_tests(
    session: nox.Session, package: str, release: str, flag: str, folder: str, megatron: Path | None = None
) -> None:
    """Run pytest with the session's arguments in the environment that has this release of the package.

    megatron: a checkout whose Megatron is used in place of the installed one.
    """
    pinned = release == PINNED[package]
    venv = ROOT / (".venv" if pinned else folder)
    asked = () if pinned else (flag, release)
    environment = {"VENV": str(venv), "OMP_NUM_THREADS": "1"}  # one thread: many processes on few cores
    if megatron is not None:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, megatron)))
    session.run("bash", "scripts/setup_env.sh", "--extras", "test", *asked, env=environment, external=True)
    session.run(str(venv / "bin" / "python"), "-m", "pytest", *session.posargs, env=environment, external=True)


@nox.session
@nox.parametrize("release", MEGATRON, ids=MEGATRON)
def megatron(session: nox.Session, release: str) -> None:
    """Test one release of megatron-core."""
    run_tests(session, "megatron-core", release, "--megatron", f".venv-{release}")


@nox.session
@nox.parametrize("release", TORCH, ids=TORCH)
def torch(session: nox.Session, release: str) -> None:
    """Test one release of torch."""
    run_tests(session, "torch", release, "--torch", f".venv-torch-{release}")


@nox.session
@nox.parametrize("release", TORCH[1:], ids=TORCH[1:])
def main(session: nox.Session, release: str) -> None:
    """Test the Megatron of the checkout in MEGATRON_LM with one release of torch."""
    checkout = Path(os.environ.get("MEGATRON_LM", ""))
    if not (checkout / "megatron" / "core" / "package_info.py").is_file():
        session.error("MEGATRON_LM=/path/to/checkout must name a checkout of Megatron-LM, with megatron/core in it")
    run_tests(session, "torch", release, "--torch", f".venv-torch-{release}", checkout.resolve())
