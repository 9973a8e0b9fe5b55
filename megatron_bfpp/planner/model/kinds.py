"""Which layers of a model are alike, and what was counted of them already: a search asks again and again."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from .layers import Layer, Prediction
from .stages import Stage

__all__ = ["Kinds"]

T = TypeVar("T")


class Kinds(ABC):
    """The part of a model that knows its layers as a few kinds and a number of each."""

    @property
    @abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the decoder in order."""

    @property
    @abstractmethod
    def predictions(self) -> tuple[Prediction, ...]:
        """The layers of multi-token prediction."""

    @cached_property
    def kinds(self) -> tuple[Layer, ...]:
        """The layers that differ."""
        return tuple(dict.fromkeys((*self.layers, *self.predictions)))

    @cached_property
    def _counts_to(self) -> list[tuple[int, ...]]:
        """For each layer, how many of each kind stand before it; and for the end."""
        place = {kind: number for number, kind in enumerate(self.kinds)}
        found = [(0,) * len(self.kinds)]
        for layer in self.layers:
            one = place[layer]
            found.append(tuple(count + (kind == one) for kind, count in enumerate(found[-1])))
        return found

    def counts(self, stage: Stage) -> tuple[int, ...]:
        """Count the layers of each kind on a stage."""
        return self.once(stage, lambda: self._count(stage))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what was made under that key before: a search asks for the same stages again and again."""
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found

    @cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}

    def _count(self, stage: Stage) -> tuple[int, ...]:
        before, behind = self._counts_to[stage.first], self._counts_to[stage.first + stage.layers]
        found = [end - start for start, end in zip(before, behind, strict=True)]
        for layer in self.predictions[: stage.mtp]:
            found[self.kinds.index(layer)] += 1
        return tuple(found)

    def alike(self, stages: tuple[Stage, ...]) -> tuple[list[Stage], list[int]]:
        """Return one stage of each kind, and for each stage the place of its kind among these."""
        return self.once(("alike", stages), lambda: self._sorted(stages))

    def _sorted(self, stages: tuple[Stage, ...]) -> tuple[list[Stage], list[int]]:
        keys = [(self.counts(stage), stage[2:]) for stage in stages]
        first = dict(zip(keys, stages, strict=True))
        place = {key: number for number, key in enumerate(first)}
        return list(first.values()), [place[key] for key in keys]

    def on_stage(self, stage: Stage, each: Sequence[float]) -> float:
        """Add up over the layers of a stage. each: of one layer of each kind."""
        return sum(count * one for count, one in zip(self.counts(stage), each, strict=True))
