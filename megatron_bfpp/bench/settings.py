"""The cases that a command line of `bfpp bench` names, in forwards of a chunk; and those of a model's estimate."""

import argparse
from typing import NamedTuple

from ..console.errors import UserError
from ..schedule import PipelineShape
from ..schedule.costs import Costs, at
from .case import SHARDED, Case


class Setting(NamedTuple):
    """A case of a set.

    hop, transfer: of a message, in forwards of a chunk. reduction, gather: of a chunk, in the backwards and the
    forwards of all its micro-batches; without both there is no data parallelism. node_size: pipeline ranks in a node,
    within which a message takes node_hop and node_transfer.
    """

    shape: PipelineShape
    hop: float = 0.0
    transfer: float = 0.0
    reduction: float = 0.0
    gather: float = 0.0
    node_size: int = 1
    node_hop: float = 0.0
    node_transfer: float = 0.0

    @property
    def is_replicated(self) -> bool:
        return self.reduction > 0 or self.gather > 0

    @property
    def network(self) -> str:
        named = ("hop", self.hop), ("transfer", self.transfer), ("reduction", self.reduction), ("gather", self.gather)
        text = " + ".join(f"{name} {value:.3g}" for name, value in named if value) or "free"
        if self.node_size == 1:
            return text
        return f"{text}, nodes of {self.node_size} with hop {self.node_hop:.3g} + transfer {self.node_transfer:.3g}"

    def case(self, args: argparse.Namespace, arms: list[str]) -> Case:
        """Return the case in seconds. arms: full sharding is left out where there is no data parallelism."""
        forward_s, count, crosses = args.forward_ms / 1e3, self.shape.num_microbatches, None
        if self.node_size > 1:
            crosses = self.shape.edges_between_nodes(self.node_size)

        def of_edges(between: float, within: float) -> float | list[float]:
            return between if crosses is None else [between if each else within for each in crosses]

        costs = Costs(
            forward=forward_s,
            backward=forward_s * args.backward_time,
            weights=None if args.weights_time is None else forward_s * args.weights_time,
            hop=of_edges(self.hop * forward_s, self.node_hop * forward_s),
            transfer=of_edges(self.transfer * forward_s, self.node_transfer * forward_s),
            gather=self.gather * count * forward_s,
            reduction=self.reduction * count * forward_s * args.backward_time,
            buckets=args.buckets if self.is_replicated else 1,
            shared_card=args.shared_card if crosses is None else [args.shared_card and each for each in crosses],
        )
        queue = ", one hardware queue" if args.connections == 1 else ""
        return Case(
            self.shape, costs, self.network + queue, self.node_size, not args.half_duplex, args.jitter,
            replicas=args.dp if self.is_replicated else 1,
            arms=tuple(arm for arm in arms if self.is_replicated or arm != SHARDED), repeat=args.repeat,
            connections=args.connections or 32, hop=args.breadth_first_hop,
            weight_lag=args.breadth_first_weight_lag,
        )  # fmt: skip


# With the defaults about 4 and 25 minutes (full with --repeat 1).
SHORT = [
    Setting(PipelineShape(4, 2, 8), 0.5),
    Setting(PipelineShape(4, 4, 8), 0.5),
    Setting(PipelineShape(4, 4, 8), 0.25, 0.25),
    Setting(PipelineShape(4, 4, 8), reduction=1.0),
]
FULL = [Setting(PipelineShape(4, 4, 8))]
FULL += [
    Setting(PipelineShape(pp, chunks, times * pp), *message)
    for message in ((0.5, 0.0), (0.25, 0.25)) for pp in (4, 8) for chunks in (2, 4) for times in (2, 4)
]  # fmt: skip
FULL += [
    Setting(PipelineShape(*sizes), 0.5, 0.0, *collectives)
    for sizes, collectives in (((4, 4, 8), (1.0, 0.0)), ((4, 4, 8), (0.5, 0.5)), ((4, 4, 8), (1.0, 1.0)),
                               ((4, 2, 8), (0.5, 0.5)), ((4, 2, 8), (1.0, 1.0)), ((8, 4, 16), (1.0, 0.0)))
]  # fmt: skip
# Where a split backward matters most: as many micro-batches as ranks; where its lag does: hops, and reductions.
SPLIT = [Setting(PipelineShape(*sizes), hop) for sizes in ((8, 4, 8), (4, 4, 4)) for hop in (0.0, 0.2)]
SPLIT += [Setting(PipelineShape(*sizes), 0.2) for sizes in ((8, 4, 16), (4, 4, 8))]
SPLIT += [Setting(PipelineShape(8, 4, 16), reduction=reduction) for reduction in (0.25, 0.5)]
_SETS = {"short": SHORT, "full": FULL, "split": SPLIT}


def settings(args: argparse.Namespace) -> list[Setting]:
    """Return the cases that the command line names. --model also sets args.backward_time and connections."""
    chosen = [_of_model(args)] if args.model is not None else _named(args)
    if args.weights_time is not None and args.weights_time >= args.backward_time:
        raise UserError(
            f"--weights-time is {args.weights_time:g} forwards, but a whole backward takes {args.backward_time:.3g}.\n"
            "  Use a shorter --weights-time: the input's gradient takes the rest of the backward."
        )
    return chosen


def _named(args: argparse.Namespace) -> list[Setting]:
    if args.node_size is None and (args.node_hop or args.node_transfer):
        raise UserError(
            "--node-hop and --node-transfer are of messages within a node, and each rank has a node of its own.\n"
            "  Add --node-size N."
        )
    if all(each is None for each in (args.shape, args.hop, args.transfer, args.reduction, args.gather, args.node_size)):
        return _SETS[args.set]
    shapes = args.shape or list(dict.fromkeys(each.shape for each in SHORT))
    hops = args.hop or ((0.5,) if args.transfer is None else (0.0,))
    rest = args.transfer or 0.0, args.reduction or 0.0, args.gather or 0.0
    node = args.node_size or 1, args.node_hop, args.node_transfer
    return [Setting(shape, hop, *rest, *node) for shape in shapes for hop in hops]


def _of_model(args: argparse.Namespace) -> Setting:
    """Return the strategy of a model's flags in slow motion: everything as long, in forwards of a chunk, as estimated.

    The stages are equal here: each takes the mean.
    """
    from ..planner.command import model_words
    from ..planner.flags import gpt_of, parse, precision_of, strategy_of
    from ..planner.hardware import load_gpu
    from ..planner.time import durations

    _check_model_flags(args)
    flags = parse(model_words([args.model]))
    gpu, strategy = load_gpu(args.gpu), strategy_of(flags, args.gpus)
    if strategy.pp < 2:
        raise UserError(f"{args.model} on {args.gpus} GPUs has no pipeline ranks, and so no schedule to run.")
    precision = precision_of(flags) or gpu.precision
    if not gpu.has(precision):
        raise UserError(f"{args.model} trains in {precision}, which {gpu.name} does not have.\n  Use another --gpu.")
    times = durations(gpt_of(flags), strategy, gpu, precision)
    forward, backward = sum(times.forward) / len(times.forward), sum(times.backward) / len(times.backward)
    count, args.backward_time = strategy.num_microbatches, backward / forward
    args.connections = args.connections or strategy.connections(gpu.compute_capability)
    print(
        f"{args.model}, {strategy.dp} replicas of PP {strategy.pp} x TP {strategy.tp} on {gpu.name}: a forward of a "
        f"chunk takes {1e3 * forward:.3g} ms there and {args.forward_ms:g} ms here, a backward "
        f"{args.backward_time:.2f} times that"
    )
    collectives = 0.0, 0.0
    if strategy.replicas > 1:
        collectives = times.reduction / (count * backward), times.gather / (count * forward)
    # Where nodes hold a number of whole pipeline ranks; else some messages of every edge cross, but for a few edges.
    apart = strategy.tp * strategy.replicas
    in_node = max(1, gpu.gpus_per_node // apart)
    edges = gpu.crosses(apart, strategy.pp)
    is_regular = strategy.shape.edges_between_nodes(in_node) == edges
    messages = [(at(times.hop, edge) / forward, at(times.transfer, edge) / forward) for edge in range(strategy.pp)]
    slow = next((each for each, crosses in zip(messages, edges, strict=True) if crosses), messages[0])
    shape = PipelineShape(strategy.pp, strategy.chunks, count)
    if not is_regular or all(edges) or not any(edges):
        return Setting(shape, *slow, *collectives)
    return Setting(shape, *slow, *collectives, in_node, *messages[edges.index(False)])


def _check_model_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that --model replaces, or lacks."""
    wrong = [f"--{name} is not given" for name in ("gpu", "gpus") if getattr(args, name) is None]
    for name in ("shape", "hop", "transfer", "reduction", "gather", "node_size"):
        if getattr(args, name) is not None:
            wrong.insert(0, f"--{name.replace('_', '-')} is set as well")
    if wrong:
        raise UserError(f"--model takes its times from an estimate for --gpus of a --gpu, but {wrong[0]}.")
