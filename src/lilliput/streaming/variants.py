"""What a few samples become in models that differ in a few weights, carried through the blocks side by side.

Variant 0 is the model as it is. The first variants change in every block, each by its own factor on the changes; of the
others each has changed in one block, or before the first, and is the model as it is from there on. So a walk over the
blocks with one of them resident tries as many changes as there are linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lilliput.anatomy.calls import Calls
from lilliput.anatomy.skeleton import Skeleton
from lilliput.streaming.backward import Read
from lilliput.streaming.states import Activations


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
    own, each by its factor of `alone`; `whole`: factors on all changes at once, in variants 1, 2, ..."""

    original: Read
    changed: Read
    groups: Sequence[Sequence[str]]
    alone: Sequence[float]
    whole: Sequence[float]

    def tensor(self, name: str, factor: float) -> Tensor:
        value = self.original(name).float()
        return value + factor * (self.changed(name).float() - value)


def advance(skeleton: Skeleton, block: int, calls: Calls, before: Variants, after: Variants, changes: Changes) -> None:
    """Take all variants through a loaded block; `after` has one more for each group. `calls` are those of one sample.

    The block is left as it was.
    """
    for variant in (0, *range(1 + len(changes.whole), before.count)):
        _run(skeleton, block, calls, before, after, variant, variant)
    for number, (group, factor) in enumerate(zip(changes.groups, changes.alone, strict=True)):
        for name in group:
            skeleton.load({name: changes.tensor(name, factor)})
        _run(skeleton, block, calls, before, after, 0, before.count + number)
        for name in group:
            skeleton.load({name: changes.original(name)})
    names = list(dict.fromkeys(name for group in changes.groups for name in group))
    for variant, factor in enumerate(changes.whole, 1):
        for name in names:
            skeleton.load({name: changes.tensor(name, factor)})
        _run(skeleton, block, calls, before, after, variant, variant)
    for name in names:
        skeleton.load({name: changes.original(name)})


def _run(
    skeleton: Skeleton, block: int, calls: Calls, before: Variants, after: Variants, source: int, target: int
) -> None:
    for sample in range(before.samples):
        hidden = before.read(source, sample).to(skeleton.device)
        after.write(target, sample, skeleton.run(block, hidden, calls))
