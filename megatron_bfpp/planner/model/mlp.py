"""MLPs as Megatron builds them: dense, or experts of which a router chooses some for each token."""

from dataclasses import dataclass

from .attention import Block
from .split import Gemm, Split

__all__ = ["MLP", "Experts"]


@dataclass(frozen=True)
class MLP(Block):
    """Two linear layers; with a gate the first has twice the width."""

    ffn: int
    is_gated: bool = False
    bias: bool = True

    @property
    def fc1_width(self) -> int:
        return self.ffn * (2 if self.is_gated else 1)

    def parameters(self, tp: int) -> int:
        biases = self.fc1_width // tp + self.hidden if self.bias else 0
        return self.hidden * (self.fc1_width + self.ffn) // tp + biases

    def gemms(self, tokens: int, split: Split) -> list[Gemm]:
        width, ffn = self.fc1_width // split.tp, self.ffn // split.tp
        return [Gemm(tokens, width, self.hidden), Gemm(tokens, self.hidden, ffn)]

    def operations(self, length: int) -> float:
        return 2.0 * self.hidden * (self.fc1_width + self.ffn)


@dataclass(frozen=True)
class Experts(Block):
    """A router, experts that are alike, and an expert that all tokens share. Tokens are counted as spread evenly."""

    count: int
    chosen: int  # experts of a token: --moe-router-topk
    ffn: int  # of one expert
    is_gated: bool = False
    bias: bool = True  # of experts and router
    shared_ffn: int = 0  # of the shared expert; 0: none
    has_shared_gate: bool = False
    latent: int = 0  # width at which the experts work, between two more projections; 0: `hidden`

    @property
    def width(self) -> int:
        """Width of a token where the experts take it."""
        return self.latent or self.hidden

    @property
    def expert(self) -> MLP:
        return MLP(self.width, self.ffn, self.is_gated, self.bias)

    @property
    def shared(self) -> MLP | None:
        return MLP(self.hidden, self.shared_ffn, self.is_gated, self.bias) if self.shared_ffn else None

    def parameters(self, tp: int) -> int:
        count = self.count * (self.hidden + self.bias)  # the router
        count += 2 * self.hidden * self.latent + (self.hidden + self.latent if self.latent and self.bias else 0)
        count += 0 if self.shared is None else self.shared.parameters(tp)
        return count + (self.hidden if self.shared is not None and self.has_shared_gate else 0)

    def expert_parameters(self, split: Split) -> int:
        return self.count // split.ep * self.expert.parameters(split.etp)

    def gemms(self, tokens: int, split: Split) -> list[Gemm]:
        own = self.count // split.ep
        # A rank's experts have the tokens of all ranks among which they are divided: of tp * ep / (etp * ep) times its
        # own, when sequence parallelism divides the tokens by tp.
        each = max(1, tokens * self.chosen * split.etp * split.ep // (split.tp * self.count))
        found = [Gemm(tokens // split.tp or 1, self.count, self.hidden)]
        if self.latent:
            part = tokens // split.tp or 1
            found += [Gemm(part, self.latent, self.hidden), Gemm(part, self.hidden, self.latent)]
        found += [gemm._replace(products=own) for gemm in self.expert.gemms(each, Split(split.etp))]
        return found + ([] if self.shared is None else self.shared.gemms(tokens, split))

    def operations(self, length: int) -> float:
        routed = self.chosen * self.expert.operations(length)
        latent = 4.0 * self.hidden * self.latent
        return routed + latent + (0.0 if self.shared is None else self.shared.operations(length))
