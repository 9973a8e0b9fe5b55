"""Memory and time of a job with its layers where Megatron has put them, evenly or not.

Parameters, activations and times are those of the rank's own stages. With uneven stages gathers and reductions count
every chunk as the longest one: there the estimate is a bound.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from ..planner.flags import gpt_of, parse, precision_of, strategy_of
from ..planner.flags.placing import Placing, placing_of
from ..planner.hardware import GPU
from ..planner.memory import PRECISIONS, Memory, memory
from ..planner.model import GPT
from ..planner.steps import REPLAY_LIMIT, Step, formula_step, replay_step
from ..planner.strategy import Strategy
from ..planner.time import durations

__all__ = ["Placed", "placed"]


@dataclass(frozen=True)
class Placed:
    """A model on its stages."""

    gpt: GPT
    strategy: Strategy
    precision: str

    @cached_property
    def _local(self) -> GPT:
        if self.gpt.latent is None:
            return self.gpt
        return replace(self.gpt, latent=replace(self.gpt.latent, is_down_split=True))

    @property
    def is_even(self) -> bool:
        return len(set(self.strategy.stage_layers)) == 1

    def parameters(self, stage: int) -> int:
        """Count the parameters of a stage on one rank, those of its experts included, as a dry run builds it: with
        Megatron's local layers, which divide latent attention's projections over TP where Transformer Engine's do not.
        """
        gpt, own = self._local, self.strategy.stages(self.gpt)[stage]
        return gpt.stage_parameters(own, self.strategy.tp) + gpt.stage_expert_parameters(own, self.strategy.split)

    def memory(self, gpu: GPU, pp_rank: int) -> Memory:
        return memory(self.gpt, self.strategy, PRECISIONS[self.precision], gpu.flash_attention, pp_rank)

    def step(self, gpu: GPU) -> Step:
        s, times = self.strategy, durations(self.gpt, self.strategy, gpu, self.precision)
        is_short = s.pp * s.chunks * s.num_microbatches <= REPLAY_LIMIT
        if is_short or not self.is_even:
            return replay_step(s, times, s.connections(gpu.compute_capability))
        return formula_step(s, times)


def placed(
    words: list[str], num_gpus: int, chunks: int, stage_layers: list[int], resident_chunks: int | None
) -> Placed:
    """Estimate the job of Megatron's flags, with the placement that Megatron made of them.

    Raises UserError for a model or a strategy that the estimate does not know.
    """
    flags = parse(words)
    gpt, layout = gpt_of(flags), flags.pipeline_model_parallel_layout
    mtp_stage = -1 if layout is None else placing_of(flags, flags.pipeline_model_parallel_size, 0).mtp_stage
    strategy = strategy_of(flags, num_gpus, Placing(chunks, tuple(stage_layers), mtp_stage))
    if resident_chunks == chunks:
        strategy = replace(strategy, sharding="zero2")
    return Placed(gpt, strategy, precision_of(flags) or "fp32")
