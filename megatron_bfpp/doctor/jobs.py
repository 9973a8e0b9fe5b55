"""Starts the doctor's training jobs: one process per rank of this machine, with its log in the job's folder."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..console.processes import Ranks, first_error, free_port, package_on_path, rank_environment

TIMEOUT_S = 300.0  # for a job, which takes 15 s; imports from a network file system can take minutes
TRAINER = "megatron_bfpp.pretrain_gpt"
# They need neither Apex nor Transformer Engine.
PLAIN_LAYERS = (
    *("--transformer-impl", "local", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm"),
    "--no-masked-softmax-fusion",
)
# Kernels that give the same bits twice.
DETERMINISTIC = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
# Two ranks on one GPU: NCCL 2.30 allows it when asked.
SHARED_CARD = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "2", "NCCL_NVLS_ENABLE": "0"}
# Variables of a launcher around this command, and those that would lead the ranks elsewhere.
_NOT_OURS = ("SLURM_", "TORCHELASTIC_", "BFPP_", "WANDB_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_")


def tiny(pp: int, chunks: int, global_batch: int, steps: int) -> list[str]:
    """Return the flags of a GPT with one layer per chunk; of 13,000 parameters on PP 2 x 2 chunks."""
    return f"""
        --num-layers {pp * chunks} --hidden-size 16 --num-attention-heads 2 --seq-length 16 --vocab-size 64
        --max-position-embeddings 16 --micro-batch-size 1 --lr 1e-2 {in_pipeline(pp, chunks, global_batch, steps)}
    """.split()


def in_pipeline(pp: int, chunks: int, global_batch: int, steps: int) -> str:
    """Return the flags of every job: how it is divided, mock data, and no evaluation. One chunk is a plain pipeline."""
    virtual = f"--num-virtual-stages-per-pipeline-rank {chunks}" if chunks > 1 else ""
    return f"""
        --pipeline-model-parallel-size {pp} {virtual} --global-batch-size {global_batch} --train-iters {steps}
        --mock-data --tokenizer-type NullTokenizer --seed 1234 --attention-dropout 0 --hidden-dropout 0
        --log-interval 1 --eval-iters 0 --eval-interval 1000 --split 1,0,0 --num-workers 0
    """


@dataclass(frozen=True)
class Job:
    """A job of Megatron's trainer. Its logs, the files of its run and its data caches are in `folder`.

    module, script: what a rank runs, and what stands between --device and Megatron's flags. shares_card: all ranks
    run on one GPU.
    """

    name: str
    folder: Path
    device: str
    ranks: int
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    module: str = TRAINER
    script: tuple[str, ...] = ()
    shares_card: bool = False

    @property
    def logs(self) -> list[Path]:
        return [self.folder / f"{self.name}.rank{rank}.log" for rank in range(self.ranks)]

    @property
    def run_folder(self) -> Path:
        """The files of the run: the folder of --bfpp-run-dir."""
        return self.folder / self.name

    def steps(self) -> int:
        """Count the steps that have ended."""
        file = self.run_folder / "steps.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    def start(self) -> Ranks:
        """Start the ranks. Leaving the `with` block of what is returned ends them."""
        command = [sys.executable, "-m", self.module, "--device", self.device, *self.script, *self.words]
        command += ["--bfpp-run-dir", str(self.run_folder), "--data-cache-path", f"{self.run_folder}.cache"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
        kept |= {"PYTHONPATH": package_on_path(), "PYTHONWARNINGS": "ignore"}
        port, ranks = free_port(), Ranks()
        try:
            for rank, log in enumerate(self.logs):
                ours = rank_environment(rank, self.ranks, port) | self.environment
                if self.shares_card:
                    ours |= SHARED_CARD | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
                ranks.start(command, log, kept | ours)
        except BaseException:
            ranks.end()
            raise
        return ranks

    def failure(self, codes: list[int | None]) -> str:
        """Return why the job did not end well, with the first error of a log; "" if it did."""
        for rank, code in enumerate(codes):
            if code:
                return f"{self.name}: rank {rank} ended with {code}: {last_words(self.logs[rank])}"
        if None in codes:
            return f"{self.name} did not end within {TIMEOUT_S:.0f} s; rank 0 reported last: {last_words(self.logs[0])}"
        return ""


def last_words(log: Path) -> str:
    """Return the first error of a log, else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return (first_error(log) or (lines or ["nothing"])[-1]).strip()[:300]
