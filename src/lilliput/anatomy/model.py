"""What a model is made of. Plain data, found by `lilliput.anatomy.explore` and verified numerically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "router", "other", "embed", "lm_head"]


@dataclass(frozen=True)
class Linear:
    """A linear of a block. `name` is relative to the block ("self_attn.q_proj"); its tensor is `name + ".weight"`.

    An embedding or head outside the blocks is described alike, by its full name: see `anatomy.tables`.
    """

    name: str
    role: Role
    site: str
    out_features: int
    in_features: int
    bias: bool = False
    transposed: bool = False  # stored as [in, out] (Conv1D)
    expert: int | None = None
    also: tuple[str, ...] = ()  # other modules that use the same tensor: the head that is tied to an embedding

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Site:
    """An input that one or more linears share; named after the first of them that runs."""

    name: str
    width: int
    linears: tuple[str, ...]
    stage: int  # order of execution within the block; sites of one stage are independent of each other


@dataclass(frozen=True)
class Link:
    """Channel j read by `readers` is row index[j] of `producer`: a scale may move between them.

    kind "norm": the producer is a norm with gain (offset + weight) and possibly a bias; kind "linear": a linear
    (rows of its weight, and its bias). `index` is int64 [width]; rows that occur twice share one scale (grouped
    queries). `head`: channels come in stretches of that many, the heads of values, within which any orthogonal matrix
    may move as well (0: no). `shifts`: the producer is a norm with a bias, and so has every reader, so that a shift of
    its output may move too.
    """

    kind: Literal["norm", "linear"]
    producer: str
    readers: tuple[str, ...]
    site: str
    index: Tensor
    offset: float = 0.0  # Gemma stores gain - 1
    error: float = 0.0  # relative change of the block's output seen when it was verified
    head: int = 0
    shifts: bool = False

    def heads(self) -> tuple[Tensor, Tensor]:
        """Rows of the producer by head of values, int64 [heads, head], and which of them each stretch of channels
        reads, int64 [width / head]."""
        stretches = self.index.view(-1, self.head)
        rows, which = stretches.unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
        return rows, which

    def tie(self, values: Tensor, reduce: Literal["amax", "mean"] = "amax") -> Tensor:
        """values [width] made equal wherever channels share a producer row."""
        rows = int(self.index.max()) + 1
        index = self.index.to(values.device)
        folded = torch.zeros(rows, dtype=values.dtype, device=values.device)
        folded = folded.scatter_reduce(0, index, values, reduce, include_self=False)
        return folded[index]


@dataclass(frozen=True)
class Group:
    """Things that leave together: a head (with its query group), a hidden channel, an expert."""

    kind: Literal["head", "channel", "expert"]
    members: tuple[tuple[str, Literal["rows", "columns"], tuple[int, int]], ...]  # linear, axis, [start, stop)


@dataclass(frozen=True)
class Channels:
    """The hidden channels of one MLP: channel j is row index[j] of each producer and column j of each reader."""

    rows: tuple[tuple[str, Tensor], ...]  # producer, index int64 [width]
    readers: tuple[str, ...]
    width: int

    def group(self, j: int) -> Group:
        """Channel j as a group."""
        index = [(name, int(rows[j])) for name, rows in self.rows]
        rows: list[tuple[str, Literal["rows", "columns"], tuple[int, int]]] = [
            (n, "rows", (r, r + 1)) for n, r in index
        ]
        return Group("channel", (*rows, *((name, "columns", (j, j + 1)) for name in self.readers)))


class Groups(Sequence[Group]):
    """All groups of a block: heads and experts, then every hidden channel, made when it is asked for."""

    def __init__(self, listed: Sequence[Group] = (), channels: Sequence[Channels] = ()) -> None:
        self.listed = tuple(listed)
        self.channels = tuple(channels)

    def __len__(self) -> int:
        return len(self.listed) + sum(c.width for c in self.channels)

    @overload
    def __getitem__(self, i: int) -> Group: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, i: int | slice) -> Group | tuple[Group, ...]:
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        if not -len(self) <= i < len(self):
            raise IndexError(f"group {i} of {len(self)}")
        i %= len(self)
        if i < len(self.listed):
            return self.listed[i]
        i -= len(self.listed)
        for channels in self.channels:
            if i < channels.width:
                return channels.group(i)
            i -= channels.width
        raise IndexError("unreachable: lengths were checked")

    def count(self, value: object) -> int:
        """How many groups there are of a kind ("head", "channel", "expert"), or how often a group occurs."""
        if value == "channel":
            return sum(c.width for c in self.channels)
        return sum(g.kind == value or g == value for g in self.listed)


@dataclass(frozen=True)
class Block:
    """One kind of block: blocks of equal anatomy share this description."""

    linears: tuple[Linear, ...]
    sites: tuple[Site, ...]  # in order of execution
    links: tuple[Link, ...]
    groups: Groups
    notes: tuple[str, ...] = ()  # what could not be verified, in words
    residual_readers: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (norm, linears that read it); empty: no rotation
    residual_writers: tuple[str, ...] = ()  # linears whose output is added to the residual stream
    chosen: int = 0  # experts that each token uses

    def linear(self, name: str) -> Linear:
        return next(x for x in self.linears if x.name == name)

    def site(self, name: str) -> Site:
        return next(x for x in self.sites if x.name == name)


@dataclass(frozen=True)
class Anatomy:
    """A causal language model: names are those of the module tree that `Skeleton` builds."""

    architecture: str
    embeddings: tuple[str, ...]  # tensors before the blocks
    block_names: tuple[str, ...]  # "model.layers.0", ...
    blocks: tuple[Block, ...]  # one per block; equal kinds are the same object
    final: tuple[str, ...]  # tensors between the last block and the head
    head: str  # tensor of the output projection
    tied: bool
    notes: tuple[str, ...] = ()
