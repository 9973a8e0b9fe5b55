"""A SLURM of two nodes on this machine, for as long as a test needs it: Debian's slurm-wlm and munge, without systemd.

munged, slurmctld and two slurmd run from a folder of their own, on free ports, with a key of their own; a SLURM of the
machine is not touched. Processes of the nodes are found by their SLURM_CONF, and ended with them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from megatron_bfpp.console.processes import free_port, marked

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "scancel")
CONFIGURATION = """
ClusterName=bfpp
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued waits as long as the credentials of its first start are good for; SLURM's default is 120 s.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
KillWait=10
# How often SLURM looks for a job that may start again; its defaults are 60 and 30 s.
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first},{second}] CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return why no SLURM can be started here; None if it can."""
    if sys.platform != "linux":
        return f"SLURM runs on Linux, this is {sys.platform}"
    missing = [name for name in PROGRAMS if path_of(name) is None]
    if missing:
        return f"{', '.join(missing)} are not installed: bash scripts/setup_system_tests.sh"
    return None if os.geteuid() == 0 else "slurmd needs root"


def path_of(program: str) -> str | None:
    """Find a program. Debian keeps the daemons where only root's PATH looks."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """Two idle nodes for a `with` block. At its end none of their processes is left, nor their folder."""

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="bfpp-slurm-"))  # short: a socket's path has at most 107 letters
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**_own_environment(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *words: str, **settings: str) -> str:
        """Return the output of one of SLURM's commands. AssertionError with that output if it fails."""
        environment = self.environment | settings
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def state(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, what, timeout_s: float, job: str = "", log: Path | None = None) -> None:
        """Wait until what() is true. AssertionError if that takes too long, or if `job` ends before."""
        deadline = time.monotonic() + timeout_s
        while not what():
            ended = job and self.state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
            if time.monotonic() > deadline or (ended and not what()):
                said = log.read_text(errors="replace")[-4000:] if log is not None and log.exists() else ""
                raise AssertionError(f"{'it ended' if ended else 'it took too long'}: {said}{self._logs()}")
            time.sleep(0.2)

    def processes(self) -> list[int]:
        """Return the ids of this cluster's daemons, and of the steps and ranks that they have started."""
        return list(marked(f"SLURM_CONF={self.folder / 'slurm.conf'}"))

    def _start(self) -> None:
        (self.folder / "state").mkdir()
        controller, first, second = free_ports(3)
        values = {"folder": self.folder, "controller": controller, "first": first, "second": second}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values, cpus=os.cpu_count() or 1))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        files = {
            "socket": "munge.sock", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log",
            "seed-file": "munge.seed",
        }  # fmt: skip
        options = [f"--{name}={self.folder / file}" for name, file in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)  # forced: the folder is root's alone
        self.wait_for((self.folder / "munge.sock").exists, 30)
        self._daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_for(self._is_idle, 60)

    def _daemon(self, program: str, *words: str) -> None:
        with open(self.folder / f"{program}.out", "ab") as log:
            command = [str(path_of(program)), *words]
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._daemons.append(subprocess.Popen(command, env=self.environment, start_new_session=True, **streams))

    def _is_idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %t"], check=False, capture_output=True, text=True, timeout=300,
            env=self.environment,
        )  # fmt: skip
        return done.stdout.strip() == "2 idle"

    def _stop(self) -> None:
        """Ask the daemons first: they end their jobs' processes. Then end what is left."""
        for number, patience_s in ((signal.SIGTERM, 5), (signal.SIGKILL, 30)):
            for process in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            deadline = time.monotonic() + patience_s
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in self._daemons:
            daemon.wait(timeout=120)
        left = self.processes()
        assert not left, f"processes of the cluster are left: {left}"

    def _logs(self) -> str:
        return "".join(
            f"\n{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in sorted(self.folder.glob("slurm*.log"))
        )


def free_ports(count: int) -> list[int]:
    """Return ports that nothing uses, in the ascending order that SLURM needs."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


def _own_environment() -> dict[str, str]:
    """Return the environment without the settings of a job that this may itself run in."""
    ours = ("SLURM", "SBATCH_", "SRUN_", "BFPP_", "WANDB_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
