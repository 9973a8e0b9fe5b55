"""Two ways to start a job: torch.distributed.run on this machine, or by srun on every node of an allocation."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ..console.errors import UserError
from .settings import ROOT, Settings

# The node's rank is SLURM's: the ranks then lie on the same nodes in every run, which a rendezvous does not promise.
_ON_NODE = 'exec "$0" -m torch.distributed.run --node-rank "${SLURM_NODEID:-0}" "$@"'


@dataclass(frozen=True)
class Local:
    """Starts torch.distributed.run on this machine."""

    python: str
    ranks_per_node: int
    nodes: int = 1

    def job(self, environment: list[str], trainer: list[str]) -> list[str]:
        """Return the command that runs `trainer` in every rank. environment: NAME=VALUE or --unset=NAME, for env."""
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks_per_node)]
        return ["env", *environment, self.python, *run, *trainer]

    def once(self, words: list[str]) -> list[str]:
        """Return the command that runs `words` once, where the jobs run."""
        return words


@dataclass(frozen=True)
class Slurm:
    """Starts torch.distributed.run in a task of srun on each node. container: flags of srun."""

    python: str
    ranks_per_node: int
    nodes: int
    container: list[str]
    address: str  # of the first node
    port: int
    is_allocated: bool

    def job(self, environment: list[str], trainer: list[str]) -> list[str]:
        """Return the command that runs `trainer` in every rank of all nodes."""
        nodes = [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        run = ["--nnodes", str(self.nodes), "--nproc-per-node", str(self.ranks_per_node),
               "--master-addr", self.address, "--master-port", str(self.port)]  # fmt: skip
        on_node = ["env", *environment, "bash", "-c", _ON_NODE, self.python]
        return ["srun", *nodes, *self.container, *on_node, *run, *trainer]

    def once(self, words: list[str]) -> list[str]:
        """Return the command that runs `words` on one node, in the container."""
        return ["srun", "--nodes=1", "--ntasks=1", *self.container, *words] if self.is_allocated else words


Launcher = Local | Slurm


def choose(kind: str, settings: Settings, environment: Mapping[str, str], dry_run: bool) -> Launcher:
    """Return the launcher. kind: local, slurm, or auto for srun inside an allocation. UserError outside one."""
    if kind == "local" or (kind == "auto" and "SLURM_JOB_ID" not in environment):
        return Local(settings.python, settings.gpus_per_node or 4)
    nodes = environment.get("SLURM_JOB_NUM_NODES", "")
    container = []
    if settings.container_image:
        paths = [str(ROOT), str(settings.output), *([settings.megatron_path] if settings.megatron_path else [])]
        mounts = settings.container_mounts or ",".join(f"{path}:{path}" for path in paths)
        container = ["--container-image", settings.container_image, "--container-mounts", mounts,
                     "--container-workdir", str(ROOT)]  # fmt: skip
    return Slurm(settings.python, settings.gpus_per_node or 8, int(nodes) if nodes.isdigit() else settings.nnodes or 1,
                 container, settings.master_addr or _first_node(environment, dry_run), settings.master_port,
                 "SLURM_JOB_ID" in environment and not dry_run)  # fmt: skip


def _first_node(environment: Mapping[str, str], dry_run: bool) -> str:
    listed = environment.get("SLURM_JOB_NODELIST", "")
    if listed:
        command = ["scontrol", "show", "hostnames", listed]
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            return done.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            raise UserError(f"scontrol does not name the first node: {error}.\n  Set MASTER_ADDR to it.") from None
    if not dry_run:
        raise UserError("there is no allocation: submit this with sbatch, or look with --dry-run")
    return "localhost"
