"""How a job is started: torch.distributed.run on this machine, or by srun on every node of an allocation."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ..console.errors import UserError
from .settings import ROOT, Settings

# The node's rank is SLURM's: the ranks then lie on the same nodes in every run, which a rendezvous does not promise.
_ON_NODE = 'exec "$0" -m torch.distributed.run --node-rank "${SLURM_NODEID:-0}" "$@"'


@dataclass(frozen=True)
class Launcher:
    """Gives the commands of jobs. srun: flags of the container, None without SLURM. meeting: flags of torchrun."""

    python: str
    ranks_per_node: int
    nodes: int = 1
    srun: list[str] | None = None
    meeting: tuple[str, ...] = ("--standalone",)
    is_allocated: bool = False

    def job(self, environment: list[str], trainer: list[str]) -> list[str]:
        """Return the command that runs `trainer` in every rank. environment: NAME=VALUE."""
        run = [*self.meeting, "--nproc-per-node", str(self.ranks_per_node), *trainer]
        if self.srun is None:
            return ["env", *environment, self.python, "-m", "torch.distributed.run", *run]
        tasks = [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        on_node = ["env", *environment, "bash", "-c", _ON_NODE, self.python]
        return ["srun", *tasks, *self.srun, *on_node, "--nnodes", str(self.nodes), *run]

    def once(self, words: list[str]) -> list[str]:
        """Return the command that runs `words` once, where the jobs run."""
        return ["srun", "--nodes=1", "--ntasks=1", *(self.srun or []), *words] if self.is_allocated else words


def choose(kind: str, settings: Settings, environment: Mapping[str, str], dry_run: bool) -> Launcher:
    """Return the launcher. kind: local, slurm, or auto for srun inside an allocation. UserError outside one."""
    if kind == "local" or (kind == "auto" and "SLURM_JOB_ID" not in environment):
        return Launcher(settings.python, settings.gpus_per_node or 4)
    container = []
    if settings.container_image:
        paths = [str(ROOT), str(settings.output), *([settings.megatron_path] if settings.megatron_path else [])]
        mounts = settings.container_mounts or ",".join(f"{path}:{path}" for path in paths)
        container = ["--container-image", settings.container_image, "--container-mounts", mounts,
                     "--container-workdir", str(ROOT)]  # fmt: skip
    first = _first_node(environment, dry_run)
    meeting = ("--master-addr", settings.master_addr or first, "--master-port", str(settings.master_port))
    nodes = int(environment.get("SLURM_JOB_NUM_NODES") or settings.nnodes or 1)
    is_allocated = "SLURM_JOB_ID" in environment and not dry_run
    return Launcher(settings.python, settings.gpus_per_node or 8, nodes, container, meeting, is_allocated)


def _first_node(environment: Mapping[str, str], dry_run: bool) -> str:
    """Return the name of the allocation's first node. UserError where there is no allocation."""
    if "SLURM_JOB_NODELIST" not in environment:
        if dry_run:
            return "localhost"
        raise UserError("there is no allocation: submit this with sbatch, or look with --dry-run")
    command = ["scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise UserError(f"scontrol does not name the first node: {error}.") from None
