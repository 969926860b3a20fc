"""AdamW over named leaves, by where its moments are kept; and the norm by which gradients are held back.

For a leaf w with gradient g, at its step t from 1 with the rate r and the decay d (Loshchilov and Hutter 2019, arXiv
1711.05101), b1 = 0.9, b2 = 0.999:

    w <- (1 - r d) w,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    w <- w - r / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + 1e-8)

torch.optim.AdamW computes the same, bit for bit (a test compares them), but loads a compiler of a hundred megabytes
first, and knows moments in memory alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput.machine import ranks
from lilliput.training import sharding
from lilliput.training.moments import KEPT, InMemory, Moments, OnDisk, Rounded

_BETAS, _TINY = (0.9, 0.999), 1e-8
_CHUNK = 1 << 16  # numbers worked on at a time
KINDS: Mapping[str, Callable[[Mapping[str, Tensor], Path], Moments]] = {
    "adamw": lambda likes, folder: InMemory(likes),
    "adamw-8bit": lambda likes, folder: Rounded(likes),
    "paged": OnDisk,
}
BYTES: Mapping[str, float] = {"adamw": 8.0, "adamw-8bit": 2.05, "paged": 0.0}  # in memory, a number that is trained


@dataclass(frozen=True)
class Leaf:
    """What is trained. factor: on the learning rate; decay: the share of it that leaves in a step, times the rate."""

    name: str
    value: Tensor
    factor: float = 1.0
    decay: float = 0.0


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor that processes have shared out; any other as it is."""
    own: Any = getattr(x, "to_local", None)
    return x if own is None else own()


def sharded(x: Tensor) -> bool:
    """Whether processes have shared a tensor out."""
    return hasattr(x, "to_local")


def update(value: Tensor, slope: Tensor, first: Tensor, second: Tensor, count: int, rate: float, decay: float) -> None:
    """One step of AdamW, in place, the leaf's number `count`; a piece at a time, which stays in a cache meanwhile."""
    whole = (value, slope, first, second)
    even = all(x.is_contiguous() for x in whole)
    pieces = zip(*(torch.split(x.view(-1), _CHUNK) for x in whole), strict=True) if even else [whole]
    for w, g, m, v in pieces:
        if decay:
            w.mul_(1 - rate * decay)
        m.lerp_(g, 1 - _BETAS[0])
        v.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
        spread = v.sqrt().div_((1 - _BETAS[1] ** count) ** 0.5).add_(_TINY)
        w.addcdiv_(m, spread, value=-(rate / (1 - _BETAS[0] ** count)))


class AdamW:
    """Steps down the gradients that lie at the leaves; a leaf without one stays where it is."""

    def __init__(self, leaves: Sequence[Leaf], kind: str, folder: Path) -> None:
        self.leaves = tuple(leaves)
        likes = {x.name: local(x.value.detach()).float() for x in leaves}
        self._moments = KINDS[kind](likes, folder)
        self._counts = [0] * len(self.leaves)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """At the learning rate `rate`, times each leaf's factor. Gradients are gone afterwards."""
        for n, leaf in enumerate(self.leaves):
            if leaf.value.grad is None:
                continue
            self._counts[n] += 1
            first, second = self._moments.take(n)
            slope = local(leaf.value.grad)
            update(local(leaf.value), slope, first, second, self._counts[n], rate * leaf.factor, leaf.decay)
            leaf.value.grad = None
            self._moments.put(n, first, second)

    def state(self, done: int) -> dict[str, Tensor]:
        """See `Moments.state`; moments are shared out as their leaves are."""
        state = self._moments.state(done)
        for x in self.leaves:
            for kind in KEPT if sharded(x.value) else ():
                if f"{kind}.{x.name}" in state:
                    state[f"{kind}.{x.name}"] = sharding.like(state[f"{kind}.{x.name}"], x.value)
        return {**state, "counts": torch.tensor(self._counts)}

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """See `Moments.restore`."""
        self._counts = [int(x) for x in tensors["counts"]]
        own = dict(tensors)
        for x in self.leaves:
            for kind in KEPT if sharded(x.value) else ():
                if f"{kind}.{x.name}" in own:
                    own[f"{kind}.{x.name}"] = sharding.part(own[f"{kind}.{x.name}"], x.value)
        self._moments.restore(own, done)

    def settled(self, done: int) -> None:
        """See `Moments.settled`."""
        self._moments.settled(done)

    def delete(self) -> None:
        """Remove what lies on disk."""
        self._moments.delete()


@torch.no_grad()
def summed(leaves: Sequence[Leaf]) -> dict[str, Tensor]:
    """The gradients of leaves, added up over processes, by name; those that no process has are left out. Of what
    processes have shared out the mean over them has come back."""
    have = torch.tensor([x.value.grad is not None for x in leaves], dtype=torch.int64)
    if len(have):
        have = ranks.largest(have)
    slopes: dict[str, Tensor] = {}
    for leaf, some in zip(leaves, have.tolist(), strict=True):
        if not some:
            continue
        if leaf.value.grad is None:
            leaf.value.grad = torch.zeros_like(leaf.value)
        slope = leaf.value.grad
        if sharded(slope):
            local(slope).mul_(ranks.size())
        else:
            ranks.add(slope)
        slopes[leaf.name] = slope
    return slopes


def norm(slopes: Iterable[Tensor]) -> float:
    """Euclidean norm of all gradients together, of all processes where they are shared out."""
    whole, shared, some = 0.0, 0.0, False
    for x in slopes:
        sizes = [torch.linalg.vector_norm(y.float()) for y in torch.split(local(x).reshape(-1), _CHUNK)]
        square = float(torch.stack(sizes).double().square().sum()) if sizes else 0.0
        if sharded(x):
            shared, some = shared + square, True
        else:
            whole += square
    if some:
        shared = float(ranks.add(torch.tensor(shared, dtype=torch.float64)))
    return math.sqrt(whole + shared)


@torch.no_grad()
def held_back(slopes: Sequence[Tensor], most: float | None) -> float:
    """Scale gradients so that their norm is at most `most`; the norm before."""
    found = norm(slopes)
    if most is not None and math.isfinite(found) and found > most:
        for x in slopes:
            local(x).mul_(most / found)
    return found
