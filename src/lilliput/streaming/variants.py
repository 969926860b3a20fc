"""What a few samples become in models that differ in a few weights, carried through the blocks side by side.

Variant 0 is the model as it is. The first variants change in every block, each by its own factor on the changes; of the
others each has changed in one block, or before the first, and is the model as it is from there on. So a walk over the
blocks with one of them resident tries as many changes as there are linears.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lilliput.anatomy.calls import Calls
from lilliput.anatomy.skeleton import Skeleton
from lilliput.streaming.backward import Read
from lilliput.streaming.states import Activations

Pass = Callable[[Tensor], Tensor]
"""A sample's states [1, T, H] through the loaded block."""


@dataclass(frozen=True)
class Caches:
    """How a loaded block is run with keys and values stored otherwise: with nothing else changed, in a variant of its
    own behind those of the groups, and beside the changes of each factor of `whole`."""

    alone: Pass
    whole: Sequence[Pass]


@dataclass(frozen=True)
class Variants:
    """Hidden states of several models over the same samples: sample k of variant v is row v * samples + k."""

    states: Activations
    samples: int

    @property
    def count(self) -> int:
        return len(self.states) // max(self.samples, 1)

    def read(self, variant: int, sample: int) -> Tensor:
        """[1, tokens, hidden]."""
        at = variant * self.samples + sample
        return self.states.read(at, at + 1)

    def write(self, variant: int, sample: int, hidden: Tensor) -> None:
        self.states.write(variant * self.samples + sample, hidden)


@dataclass(frozen=True)
class Changes:
    """What a block's tensors, by canonical name, are and become. `groups`: what changes together in a variant of its
    own, each by its factor of `alone`; `whole`: factors on all changes at once, in variants 1, 2, ...; `caches`: None
    where the block keeps its keys and values as they are."""

    original: Read
    changed: Read
    groups: Sequence[Sequence[str]]
    alone: Sequence[float]
    whole: Sequence[float]
    caches: Caches | None = None

    def tensor(self, name: str, factor: float) -> Tensor:
        value = self.original(name).float()
        return value + factor * (self.changed(name).float() - value)


def advance(skeleton: Skeleton, block: int, calls: Calls, before: Variants, after: Variants, changes: Changes) -> None:
    """Take all variants through a loaded block; `after` has one more for each group, and for the caches. `calls` are
    those of one sample.

    The block is left as it was.
    """
    caches = changes.caches

    def plain(hidden: Tensor) -> Tensor:
        return skeleton.run(block, hidden, calls)

    def run(source: int, target: int, through: Pass = plain) -> None:
        for sample in range(before.samples):
            after.write(target, sample, through(before.read(source, sample).to(skeleton.device)))

    for variant in (0, *range(1 + len(changes.whole), before.count)):
        run(variant, variant)
    for number, (group, factor) in enumerate(zip(changes.groups, changes.alone, strict=True)):
        for name in group:
            skeleton.load({name: changes.tensor(name, factor)})
        run(0, before.count + number)
        for name in group:
            skeleton.load({name: changes.original(name)})
    if caches is not None:
        run(0, before.count + len(changes.groups), caches.alone)
    names = list(dict.fromkeys(name for group in changes.groups for name in group))
    for variant, factor in enumerate(changes.whole, 1):
        for name in names:
            skeleton.load({name: changes.tensor(name, factor)})
        run(variant, variant, plain if caches is None else caches.whole[variant - 1])
    for name in names:
        skeleton.load({name: changes.original(name)})
