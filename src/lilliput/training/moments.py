"""Where an optimizer keeps what it remembers of gradients: in memory, there in 8 bits, or on disk.

In 8 bits (Dettmers et al. 2022, arXiv 2110.02861): blocks of 256 numbers, each divided by its largest magnitude, and of
that the nearest of 256 values of a dynamic type, whose leading zeros count powers of ten and whose remaining bits
divide a decade evenly. Of the second moment the square root is kept, which is what a step divides by and which spans
half as many decades; what is not 0 never becomes 0, or a step would divide by nothing. Small tensors stay in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lilliput.training.pages import Pages

KEPT = ("first", "second")  # moments of a leaf
BLOCK = 256
SMALL = 4096  # numbers of a tensor that is not worth 8 bits


class Moments(Protocol):
    """The two moments of each of some leaves, by number."""

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """Float32, to be changed in place and given to `put`."""
        ...

    def put(self, n: int, first: Tensor, second: Tensor) -> None:
        """Remember what `take` gave."""
        ...

    def state(self, done: int) -> dict[str, Tensor]:
        """What a file that a training goes on from has to hold, after so many steps; see `settled`."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Go on from such a file."""
        ...

    def settled(self, done: int) -> None:
        """The file of so many steps is durable: what earlier ones needed beside them may go."""
        ...

    def delete(self) -> None:
        """The training has ended."""
        ...


class InMemory:
    """Float32, as large as the leaves twice."""

    def __init__(self, likes: Mapping[str, Tensor]) -> None:
        self._names = tuple(likes)
        self._held = [(torch.zeros_like(x), torch.zeros_like(x)) for x in likes.values()]

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        return self._held[n]

    def put(self, n: int, first: Tensor, second: Tensor) -> None:
        self._held[n] = first, second

    def state(self, done: int) -> dict[str, Tensor]:
        pairs = zip(self._names, self._held, strict=True)
        return {f"{kind}.{name}": x for name, both in pairs for kind, x in zip(KEPT, both, strict=True)}

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        for name, both in zip(self._names, self._held, strict=True):
            for kind, x in zip(KEPT, both, strict=True):
                x.copy_(tensors[f"{kind}.{name}"])

    def settled(self, done: int) -> None:
        return

    def delete(self) -> None:
        return


def dynamic(signed: bool) -> Tensor:
    """The 256 values of the dynamic type in order, between -1 or 0 and 1: after e zeros and a one come the bits of
    f, and the value is 10^-e (0.1 + 0.9 (f + 1/2) / 2^F)."""
    bits = 6 if signed else 7
    values: list[float] = []
    for e in range(bits + 1):
        count = 1 << (bits - e)
        values += [10.0**-e * (0.1 + 0.9 * (f + 0.5) / count) for f in range(count)]
    values.sort()
    if not signed:
        values[-1] = 1.0  # the largest of a block is what the others are divided by
        return torch.tensor([0.0, *values])
    return torch.tensor([*(-x for x in reversed(values)), 0.0, *values, 1.0])


class _Blocks:
    """A tensor in 8 bits: codes, and the largest magnitude of each block."""

    def __init__(self, like: Tensor, table: Tensor) -> None:
        self._shape, self._table = like.shape, table.to(like.device)
        self._between = (self._table[1:] + self._table[:-1]) / 2
        count = -(-like.numel() // BLOCK)
        zero = int((table == 0).nonzero()[0])
        self.codes = torch.full((count, BLOCK), zero, dtype=torch.uint8, device=like.device)
        self.largest = torch.zeros(count, 1, device=like.device)
        self._signed = zero > 0

    def read(self) -> Tensor:
        flat = (self._table[self.codes.long()] * self.largest).reshape(-1)
        return flat[: self._shape.numel()].reshape(self._shape)

    def write(self, value: Tensor) -> None:
        flat = value.new_zeros(self.codes.numel())
        flat[: value.numel()] = value.reshape(-1)
        blocks = flat.reshape(-1, BLOCK)
        torch.amax(blocks.abs(), 1, keepdim=True, out=self.largest)
        shares = blocks / self.largest.clamp_min(torch.finfo(torch.float32).tiny)
        codes = torch.bucketize(shares, self._between, out_int32=True)
        if not self._signed:
            codes.clamp_min_((blocks > 0).int())
        self.codes.copy_(codes)


class Rounded:
    """8 bits a number and 4 bytes a block; see the module's docstring."""

    def __init__(self, likes: Mapping[str, Tensor]) -> None:
        self._names = tuple(likes)
        self._plain = InMemory({name: x for name, x in likes.items() if x.numel() < SMALL})
        order = [name for name, x in likes.items() if x.numel() < SMALL]
        self._place = {name: n for n, name in enumerate(order)}
        both = dynamic(True), dynamic(False)
        self._held = {
            name: (_Blocks(x, both[0]), _Blocks(x, both[1])) for name, x in likes.items() if x.numel() >= SMALL
        }

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        name = self._names[n]
        if name in self._place:
            return self._plain.take(self._place[name])
        first, root = self._held[name]
        return first.read(), root.read().square_()

    def put(self, n: int, first: Tensor, second: Tensor) -> None:
        name = self._names[n]
        if name in self._place:
            self._plain.put(self._place[name], first, second)
            return
        self._held[name][0].write(first)
        self._held[name][1].write(second.sqrt())

    def _parts(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{what}.{name}": tensor
            for name, both in self._held.items()
            for kind, x in zip(KEPT, both, strict=True)
            for what, tensor in (("codes", x.codes), ("largest", x.largest))
        }

    def state(self, done: int) -> dict[str, Tensor]:
        return {**self._plain.state(done), **self._parts()}

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        self._plain.restore(tensors, done)
        for key, value in self._parts().items():
            value.copy_(tensors[key])

    def settled(self, done: int) -> None:
        return

    def delete(self) -> None:
        return


class OnDisk:
    """Float32 in one file, of which those of one leaf are in memory at a time (paged optimizers, Dettmers et al. 2023,
    arXiv 2305.14314). A state to go on from needs a second file of the size, beside it. Of `likes` the shapes and
    devices count; on the meta device stands for the CPU."""

    def __init__(self, likes: Mapping[str, Tensor], folder: Path, *, name: str = "moments") -> None:
        self._names = tuple(likes)
        self._devices = ["cpu" if x.is_meta else x.device for x in likes.values()]
        both = {(kind, key): x for key, x in likes.items() for kind in KEPT}
        meta = {_page(*key): torch.empty(x.shape, device="meta") for key, x in both.items()}
        self._pages = Pages(meta, folder, name)

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        first, second = (self._pages.read(_page(kind, self._names[n])).to(self._devices[n]) for kind in KEPT)
        return first, second

    def put(self, n: int, first: Tensor, second: Tensor) -> None:
        for kind, value in zip(KEPT, (first, second), strict=True):
            self._pages.write(_page(kind, self._names[n]), value)

    def state(self, done: int) -> dict[str, Tensor]:
        self._pages.copy(str(done))
        return {}

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        self._pages.go_back(str(done))
        self.settled(done)

    def settled(self, done: int) -> None:
        self._pages.forget(str(done))

    def delete(self) -> None:
        self._pages.delete()


def _page(kind: str, name: str) -> str:
    return f"{kind}.{name}"
