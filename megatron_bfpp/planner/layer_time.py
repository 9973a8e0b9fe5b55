"""Durations of one layer on one GPU: its products, its other kernels, and what its ranks exchange.

tensor     Two all-reduces forward and two backward (of a layer with two blocks), or with sequence parallelism gathers
           and scatters of as many bytes. They stand between the products. --tp-comm-overlap cuts each into a piece for
           each rank, and runs the product of one beside the next: what counts is the first piece, or what exceeds it.
experts    Each token goes to its experts and comes back (exchange.py), twice forward and twice backward. Nothing
           overlaps that without --overlap-moe-expert-parallel-comm; with it, what exceeds the layer's other work
           counts. --moe-shared-expert-overlap hides it behind the shared expert. Ranks that share an expert gather its
           tokens and scatter the results. A host that launches the many kernels of such a layer needs its time too.
context    Keys and values go around a ring while the attention to those that are there runs (p2p); twice as much in
           the backward. What exceeds the attention counts. Or queries, keys, values and outputs are exchanged before
           and behind it (a2a), or keys and values gathered (all_gather), which nothing overlaps. Layers with a state
           always exchange.
"""

from .activations import Activations
from .exchange import Exchange
from .hardware import GPU, beside_products
from .model import GPT, MLP, Experts, Gemm, LatentAttention, Layer, Prediction
from .model.attention import Block
from .strategy import Strategy

__all__ = ["PASSES", "LayerTime"]

# How often kernels other than matrix products read or write what a layer stores: they write it, the next kernel reads
# it, and about once more in between. An assumption; such kernels are a tenth of a large layer.
PASSES = 3


class LayerTime:
    """Forward and backward of one layer, in seconds, and the part of its ranks' exchanges in both."""

    def __init__(self, gpt: GPT, s: Strategy, gpu: GPU, precision: str, live: Activations, layer: Layer):
        self.gpt, self.s, self.gpu, self.live = gpt, s, gpu, live
        self.exchange = Exchange(gpt, s, gpu, live)
        self.precision = precision if layer.is_fp8 else beside_products(precision)
        self.tokens = s.micro_batch * gpt.seq_length // s.cp
        of_blocks = [self._products(block.gemms(self.tokens, s.split)) for block in layer.blocks]
        self.weights = self._products(layer.gemms(self.tokens, s.split))
        square = layer.square(s.micro_batch, gpt.seq_length, s.split)
        attention, attention_back = gpu.square_s(square, beside_products(precision))
        moved = PASSES * live.layer("none", layer) / gpu.memory_bytes_per_s
        if isinstance(layer, Prediction):
            moved += gpu.gemm_s(gpt.head_gemm(s.micro_batch, s.split), beside_products(precision))
        forth = self.weights + attention + moved
        back = 2 * (self.weights + moved) + attention_back
        ends = [self._ends(*each) for each in zip(layer.blocks, of_blocks, strict=True)]
        tensor, tensor_back = (sum(each) for each in zip(*ends, strict=True))
        ring = sum(self.exchange.ring(block) for block in layer.blocks)
        between = sum(self.exchange.context(block) for block in layer.blocks)
        experts, experts_back = self._experts(layer, forth, back)
        forth_all = forth + tensor + between + experts + max(0.0, ring - attention)
        back_all = back + tensor_back + between + experts_back + max(0.0, 2 * ring - attention_back)
        again = self._again(layer, attention, forth_all)
        launched = gpu.experts_s if any(isinstance(block, Experts) for block in layer.blocks) else 0.0
        self.forward = max(forth_all, launched)
        self.backward = max(back_all + again, 2 * launched)
        self.exchanged = forth_all - forth + back_all - back
        if s.recompute == "full":
            self.exchanged += forth_all - forth

    def _products(self, gemms: list[Gemm]) -> float:
        return sum(self.gpu.gemm_s(gemm, self.precision) for gemm in gemms)

    def _ends(self, block: Block, products: float) -> tuple[float, float]:
        """Return what tensor parallelism's gather before a block and scatter behind it add, forward and backward."""
        each, tp = self.exchange.tensor(block), self.s.tp
        if not self.s.overlaps_tensor:
            return 2 * each, 2 * each
        return 2 * max(each / tp, each - products / 2), 2 * max(each / tp, each - products)

    def _experts(self, layer: Layer, forth: float, back: float) -> tuple[float, float]:
        """Return what the exchanges with experts add, forward and backward."""
        added = added_back = 0.0
        for block in layer.blocks:
            if isinstance(block, Experts):
                exchanged = self.exchange.experts(block)
                beside = beside_back = 0.0
                if self.s.overlaps_experts:
                    beside, beside_back = forth, back
                elif self.s.overlaps_shared and block.shared is not None:
                    beside = self._products(block.shared.gemms(self.tokens, self.s.split))
                    beside_back = 2 * beside
                added += max(0.0, exchanged - beside)
                added_back += max(0.0, exchanged - beside_back)
        return added, added_back

    def _again(self, layer: Layer, attention: float, forward: float) -> float:
        """Return the time of what the backward makes again."""
        s = self.s
        if s.recompute == "none":
            return 0.0
        if s.recompute == "full":
            return forward
        time = PASSES * self.live.working("selective", layer) / self.gpu.memory_bytes_per_s
        time += attention if "core_attn" in s.modules else 0.0
        for block in layer.blocks:
            products = block.gemms(self.tokens, s.split)
            if isinstance(block, MLP) and "mlp" in s.modules:
                time += self._products(products)
            elif isinstance(block, Experts) and "moe" in s.modules:
                time += self._products(products) + self.exchange.experts(block)
            elif isinstance(block, Experts) and block.shared is not None and "shared_experts" in s.modules:
                time += self._products(block.shared.gemms(self.tokens, s.split))
            elif isinstance(block, LatentAttention) and "mla_up_proj" in s.modules:
                time += self._products([each for each in products if each.k in (block.query_rank, block.rank)])
        return time
