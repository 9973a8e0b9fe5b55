"""scripts/setup_system_tests.sh never fails, and says why it installs nothing: tried with a stand-in for apt-get."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "setup_system_tests.sh"
TOOLS = ("bash", "cat", "chmod", "grep", "mktemp", "rm", "tail")
FAILS = '#!/usr/bin/env bash\necho "E: Could not resolve host"\nexit 100\n'
INSTALLS = """#!/usr/bin/env bash
echo "$*" >>"$0.calls"
case "${@: -1}" in
    slurm-wlm) names="slurmctld slurmd sbatch" ;;
    munge) names=munged ;;
    chromium) names=chromium ;;
esac
for name in ${names:-}; do : >"${0%/*}/${name}" && chmod +x "${0%/*}/${name}"; done
"""


@pytest.fixture
def machine(tmp_path):
    """machine(apt): the script's exit code and output on a machine with that apt-get, or without one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    script = tmp_path / "script.sh"  # this machine's own /usr/sbin may have them
    script.write_text(SCRIPT.read_text().replace('PATH="${PATH}:/usr/sbin:/sbin"', ":"))

    def run(apt: str | None) -> tuple[int, str]:
        if apt is not None:
            (folder / "apt-get").write_text(apt.replace("/usr/bin/env bash", str(folder / "bash")))
            (folder / "apt-get").chmod(0o755)
        done = subprocess.run(
            [folder / "bash", script],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            env={"PATH": str(folder)},
        )
        return done.returncode, done.stdout + done.stderr

    run.folder = folder
    return run


def test_without_apt_get_it_says_so(machine):
    code, said = machine(None)
    assert code == 0 and "no apt-get here; the tests that need slurm-wlm munge chromium will skip" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="installing needs root")
def test_without_a_network_it_says_so(machine):
    code, said = machine(FAILS)
    assert code == 0 and "apt-get update failed: E: Could not resolve host" in said
    assert "chromium: not installed: E: Could not resolve host" in said and said.endswith("will skip\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="installing needs root")
def test_it_installs_what_is_missing_and_a_second_run_does_nothing(machine):
    code, said = machine(INSTALLS)
    assert code == 0 and all(f"{package}: installed in" in said for package in ("slurm-wlm", "munge", "chromium"))
    calls = machine.folder / "apt-get.calls"
    words = calls.read_text().splitlines()
    assert words[0].endswith(" update") and len(words) == 4
    assert all("--yes" in line and "--no-install-recommends" in line for line in words[1:])
    assert machine(INSTALLS) == (0, "setup_system_tests: slurm-wlm, munge and chromium are installed\n")
    assert calls.read_text().splitlines() == words


@pytest.mark.skipif(os.geteuid() == 0, reason="this user may install")
def test_who_may_not_install_is_told_how(machine):
    code, said = machine(INSTALLS)
    assert code == 0 and "not root: sudo bash scripts/setup_system_tests.sh" in said
