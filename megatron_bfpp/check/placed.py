"""Memory and time of a job with its layers where Megatron has put them, evenly or not.

Parameters, and with them gradients and optimizer state, are those of the rank's own stages. With uneven stages the time
of each stage is its own; gathers, reductions and live activations count every chunk as the longest one: there the
estimate is a bound.
"""

from argparse import Namespace
from dataclasses import dataclass, replace

from ..planner.flags import gpt_of, parse, precision_of, strategy_of
from ..planner.hardware import GPU
from ..planner.memory import PRECISIONS, Memory, memory
from ..planner.model import GPT
from ..planner.steps import REPLAY_LIMIT, Step, formula_step, replay_step
from ..planner.strategy import Strategy
from ..planner.time import durations
from ..schedule.costs import at

__all__ = ["Placed", "placed"]

# Flags that say where layers go, with the layers known from the placement itself.
_PLACEMENT = (
    *("--pipeline-model-parallel-layout", "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
    *("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"),
)


@dataclass(frozen=True)
class Placed:
    """A model on its stages. stage_layers: decoder layers of every stage in order."""

    gpt: GPT
    strategy: Strategy  # of as many layers on every stage as the longest has
    precision: str
    stage_layers: list[int]

    @property
    def is_even(self) -> bool:
        return len(set(self.stage_layers)) == 1

    def parameters(self, stage: int) -> int:
        """Count the parameters of a stage on one tensor-parallel rank."""
        tp, last = self.strategy.tp, len(self.stage_layers) - 1
        count = self.stage_layers[stage] * self.gpt.layer_parameters(tp)
        if stage == 0:
            count += self.gpt.embedding_parameters(tp)
        return count + (self.gpt.head_parameters(tp, alone=last == 0) if stage == last else 0)

    def memory(self, gpu: GPU, pp_rank: int) -> Memory:
        found = memory(self._longest(), self.strategy, PRECISIONS[self.precision], gpu.flash_attention, pp_rank)
        if self.is_even or self.strategy.resident_chunks is not None:
            return found
        stages = range(pp_rank, len(self.stage_layers), self.strategy.pp)
        longest = replace(self, stage_layers=[max(self.stage_layers)] * len(self.stage_layers))
        part = sum(map(self.parameters, stages)) / sum(map(longest.parameters, stages))
        return replace(
            found, parameters=part * found.parameters, gradients=part * found.gradients,
            optimizer=part * found.optimizer, step=part * found.step,
        )  # fmt: skip

    def step(self, gpu: GPU) -> Step:
        times = durations(self._longest(), self.strategy, gpu, self.precision)
        if not self.is_even:
            most = max(self.stage_layers)
            forward, backward = (
                [count * each[0] / most for count in self.stage_layers] for each in (times.forward, times.backward)
            )
            forward[-1] += times.forward[-1] - times.forward[0]  # the head and the loss
            backward[-1] += times.backward[-1] - times.backward[0]
            weights = [float(count) * at(times.weights or 0.0, 0) / most for count in self.stage_layers]
            weights[-1] += at(times.weights or 0.0, -1) - at(times.weights or 0.0, 0)
            times = replace(times, forward=forward, backward=backward, weights=weights)
        s = self.strategy
        is_short = s.pp * s.chunks * s.num_microbatches <= REPLAY_LIMIT
        if is_short or not self.is_even:
            return replay_step(s, times, s.connections(gpu.compute_capability))
        return formula_step(s, times)

    def _longest(self) -> GPT:
        return replace(self.gpt, num_layers=max(self.stage_layers) * len(self.stage_layers))


def placed(
    words: list[str], num_gpus: int, chunks: int, stage_layers: list[int], resident_chunks: int | None
) -> Placed:
    """Estimate the job of Megatron's flags, with the placement that Megatron made of them.

    Raises UserError for a model or a strategy that the estimate does not know.
    """
    flags = parse(_without_placement(words))
    gpt = gpt_of(flags)
    whole = Namespace(**vars(flags))
    whole.num_layers = max(stage_layers) * len(stage_layers)
    whole.num_virtual_stages_per_pipeline_rank = chunks
    whole.num_layers_per_virtual_pipeline_stage = None
    strategy = strategy_of(whole, num_gpus)
    if resident_chunks == chunks:
        strategy = replace(strategy, sharding="zero2")
    return Placed(gpt, strategy, precision_of(flags) or "fp32", stage_layers)


def _without_placement(words: list[str]) -> list[str]:
    kept, skips = [], False
    for word in words:
        if word.startswith("--"):
            skips = word.split("=", 1)[0] in _PLACEMENT
        if not skips:
            kept.append(word)
    return kept
