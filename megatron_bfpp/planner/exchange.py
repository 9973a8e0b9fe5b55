"""Seconds that the ranks of one layer take to exchange what they have, in a forward.

all-to-all     Each of n ranks sends to all, in equal parts: (n-1)/n of what it has leaves it. What stays in a node
               takes its links, the rest the card of the GPU, at the same time; the longer counts.
               alltoall of Megatron sends a copy of a token for each of its k experts. flex (DeepEP, HybridEP) sends
               one to each node that has some of them, m (1 - (1 - 1/m)^k) of m nodes where experts are chosen at
               random, and copies it there. allgather gathers all tokens of the ranks and scatters the results.
ring           Keys and values of a rank go n-1 times to the next rank.

Sources: megatron/core/transformer/moe/token_dispatcher.py and context parallelism's p2p, a2a and all_gather; DeepEP
(github.com/deepseek-ai/DeepEP) for flex; Ring Attention, arXiv:2310.01889; DeepSpeed Ulysses, arXiv:2309.14509.
"""

from .activations import Activations
from .hardware import GPU
from .model import GPT, Attention, Experts, GatedDelta, LatentAttention, Mamba
from .model.attention import Block
from .strategy import Strategy

__all__ = ["Exchange"]


class Exchange:
    """The exchanges of a strategy. Each answer is 0 where the ranks have nothing to exchange."""

    def __init__(self, gpt: GPT, s: Strategy, gpu: GPU, live: Activations):
        self.gpt, self.s, self.gpu, self.live = gpt, s, gpu, live
        self.tokens = s.micro_batch * gpt.seq_length // s.cp

    def tensor(self, block: Block) -> float:
        """Time of one of the two ends of a block: half of an all-reduce."""
        if isinstance(block, Experts) and block.shared is None:
            return 0.0
        s, whole = self.s, self.live.message * (self.s.tp if self.s.is_split_along_sequence else 1)
        return self.gpu.link(1, s.tp, s.num_gpus).all_gather_s(whole, s.tp)

    def context(self, block: Block) -> float:
        """Time of what context parallelism exchanges and nothing overlaps."""
        s = self.s
        match block:
            case Mamba() | GatedDelta():
                return self._to_all(self.tokens * (block.projected + block.inner) / s.tp, s.tp, s.cp)
            case Attention() | LatentAttention() if s.cp_exchange == "a2a":
                return self._to_all(self.tokens * sum(_widths(block)) / s.tp, s.tp, s.cp)
            case Attention() | LatentAttention() if s.cp_exchange == "all_gather":
                gathered = self.gpt.seq_length * s.micro_batch * _widths(block)[1] / s.tp * self.live.element
                return self.gpu.link(s.tp, s.cp, s.num_gpus).all_gather_s(gathered, s.cp)
        return 0.0

    def ring(self, block: Block) -> float:
        """Time in which keys and values go around the ring."""
        s = self.s
        if s.cp == 1 or s.cp_exchange != "p2p" or not isinstance(block, Attention | LatentAttention):
            return 0.0
        link = self.gpu.node_link if self.gpu.is_in_node(s.tp, s.cp, s.num_gpus) else self.gpu.network_link
        size = self.tokens * _widths(block)[1] / s.tp * self.live.element
        return (s.cp - 1) * (link.latency_s + size / link.bytes_per_s)

    def experts(self, block: Experts) -> float:
        """Time in which tokens go to their experts and come back."""
        s, etp, own = self.s, self.s.split.etp, self.tokens / self.s.tp * block.width
        if s.dispatcher == "allgather":
            ranks = etp * s.ep
            return 2 * self.gpu.link(1, ranks, s.num_gpus).all_gather_s(own * ranks * self.live.element, ranks)
        copies = own * block.chosen
        gathered = self.gpu.link(1, etp, s.num_gpus).all_gather_s(copies * etp * self.live.element, etp)
        sent = None
        if s.dispatcher == "flex":
            nodes = s.ep / self.gpu.in_node(etp, s.ep, s.num_gpus)
            sent = own * nodes * (1 - (1 - 1 / nodes) ** block.chosen)
        return 2 * gathered + 2 * self._to_all(copies, etp, s.ep, sent)

    def _to_all(self, elements: float, first: int, ranks: int, sent: float | None = None) -> float:
        """Return the time in which each of `ranks` ranks that are `first` apart sends its elements to all.

        sent: how many a rank sends to nodes, where copies are made behind the network.
        """
        if ranks == 1:
            return 0.0
        gpu, in_node, element = self.gpu, self.gpu.in_node(first, ranks, self.s.num_gpus), self.live.element
        away = (elements if sent is None else sent) * element * (ranks - in_node) / ranks
        copied = elements * element if sent is not None else elements * element * in_node / ranks
        leaving, staying = (
            away / gpu.network_link.bytes_per_s,
            copied * (in_node - 1) / in_node / gpu.node_link.bytes_per_s,
        )
        return max(leaving, staying) + (gpu.network_link if leaving else gpu.node_link).latency_s


def _widths(block: Attention | LatentAttention) -> tuple[int, int]:
    """Return the widths of queries and outputs, and of keys and values."""
    if isinstance(block, Attention):
        return 2 * block.query_width, 2 * block.width * block.groups
    return block.query_width + block.output_width, block.query_width + block.output_width
