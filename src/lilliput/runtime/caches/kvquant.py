"""Keys before their rotation, by static scales; tabled levels; the largest entries and the first tokens apart
(kvquant)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.formats.bits import pack_unsigned, row_bytes, unpack_unsigned
from lilliput.runtime.caches.codec import CacheCodec, CacheShape, CodecSpec, Incoming, Shapes, Tensors
from lilliput.runtime.caches.coders import in_groups
from lilliput.runtime.caches.turns import Turn, undo

CENTRE, HALF, LEVELS = "key_cache_centre", "key_cache_half", "cache_levels"
INDEX = torch.int32  # of positions
SCALE = torch.float16


def vectors(x: Tensor) -> Tensor:
    """[batch, heads, tokens, width] as vectors of whole tokens, [batch, tokens, heads * width]."""
    return x.transpose(1, 2).flatten(2)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """Undo `vectors`."""
    return in_groups(x, 2, x.shape[2] // heads).transpose(1, 2)


def outliers(share: float, width: int) -> int:
    """Entries of a vector that are kept apart: ceil(share * width)."""
    return math.ceil(share * width - 1e-9)


def index_type(width: int) -> torch.dtype:
    """The narrowest type that numbers the entries of a vector."""
    return torch.int16 if width <= 1 << 15 else torch.int32


def value_ranges(x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which `count` entries of each vector x [.., width] are kept apart (int64 [.., count]: those farthest from its
    mean), and centre and half of the range of all others, float16 [.., 1]."""
    apart = (x - x.mean(-1, keepdim=True)).abs().topk(count, dim=-1).indices
    outside = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, apart, True)
    low = x.masked_fill(outside, torch.inf).amin(-1, keepdim=True)
    high = x.masked_fill(outside, -torch.inf).amax(-1, keepdim=True)
    return apart, ((high + low) / 2).to(SCALE), ((high - low) / 2).to(SCALE)


def normalised(x: Tensor, centre: Tensor, half: Tensor) -> Tensor:
    """(x - centre) / half; 0 where a range is none."""
    return (x - centre.float()) / torch.where(half > 0, half.float(), torch.inf)


class KvquantCodec(CacheCodec):
    """`parts`: codes of keys, entries of keys kept apart and their values; codes, centre, half, entries and values of
    values; all [batch, tokens, ..]. Before them the plain first tokens, the number of padding tokens before those, and
    the numbers of the keys' rotations."""

    pads: ClassVar[bool] = True

    def __init__(self, spec: KvquantSpec, shape: CacheShape, tensors: Tensors) -> None:
        self.spec, self.shape, self.static = spec, shape, dict(tensors)
        self.parts: list[Tensor] = []
        self.sinks: list[Tensor] = []  # keys, values [batch, sinks, width]
        self.padding = torch.empty(0, dtype=INDEX)
        self.turn: Turn | None = None
        self.index = torch.empty(0, 0, dtype=INDEX)
        self.dtype = torch.float32

    @property
    def length(self) -> int:
        return self.parts[0].shape[1] if self.parts else 0

    def append(self, keys: Tensor, values: Tensor, incoming: Incoming) -> None:
        if not self.static:
            raise LilliputError("a cache of the kind kvquant has no static scales: the folder is damaged")
        batch, first, tokens = len(keys), self.length, keys.shape[2]
        self.dtype = keys.dtype
        self.static = {name: x.to(keys.device) for name, x in self.static.items()}
        fresh = not self.parts
        raw = keys.float()
        if incoming.turn is not None:
            turn = self.turn = incoming.turn
            raw = undo(raw, turn.cos, turn.sin, turn.rotate)
            index = turn.table.add(turn.cos, turn.sin).expand(batch, -1).clone()
            self.index = index if fresh else torch.cat([self.index, index], dim=1)
        k, v = vectors(raw), vectors(values.float())
        new = [*self._keys(k), *self._values(v)]
        self.parts = new if fresh else [torch.cat(pair, dim=1) for pair in zip(self.parts, new, strict=True)]
        if fresh:
            self.padding = torch.zeros(batch, dtype=INDEX, device=keys.device)
            self.sinks = [x.new_zeros(batch, self.spec.sinks, x.shape[2], dtype=self.dtype) for x in (k, v)]
        self._first(k, v, first, tokens, incoming.real)

    def _first(self, k: Tensor, v: Tensor, start: int, tokens: int, real: Tensor | None) -> None:
        """Keep the first tokens plain that are no padding."""
        if real is not None:
            known = real.expand(len(k), -1).to(k.device)
            before = torch.where(known.any(1), known.int().argmax(1), known.shape[1])
            self.padding = before.to(INDEX)
        for number in range(self.spec.sinks):
            place = self.padding.long() + number - start
            rows = ((place >= 0) & (place < tokens)).nonzero()[:, 0]
            for sink, x in zip(self.sinks, (k, v), strict=True):
                sink[rows, number] = x[rows, place[rows]].to(sink.dtype)

    def _codes(self, z: Tensor, levels: Tensor, bits: int) -> Tensor:
        edges = (levels[0, 1:] + levels[0, :-1]) / 2
        codes = torch.bucketize(z.clamp(-1, 1).contiguous(), edges)
        return pack_unsigned(codes.flatten(0, 1), bits).view(*codes.shape[:2], -1)

    def _values_of(self, packed: Tensor, levels: Tensor, bits: int, width: int) -> Tensor:
        codes = unpack_unsigned(packed.flatten(0, 1), bits, width).view(*packed.shape[:2], width)
        return levels[1][codes.long()]

    def _keys(self, k: Tensor) -> list[Tensor]:
        width = k.shape[2]
        z = normalised(k, self.static[CENTRE].flatten(), self.static[HALF].flatten())
        count = outliers(self.spec.outliers, width)
        apart = z.abs().topk(count, dim=-1).indices
        codes = self._codes(z, self.static[f"key_{LEVELS}"], self.spec.bits)
        return [codes, apart.to(index_type(width)), k.gather(2, apart).to(self.dtype)]

    def _values(self, v: Tensor) -> list[Tensor]:
        width = v.shape[2]
        apart, centre, half = value_ranges(v, outliers(self.spec.outliers, width))
        codes = self._codes(normalised(v, centre, half), self.static[f"value_{LEVELS}"], self.spec.value_bits)
        return [codes, centre, half, apart.to(index_type(width)), v.gather(2, apart).to(self.dtype)]

    def materialise(self) -> tuple[Tensor, Tensor]:
        shape, spec, static = self.shape, self.spec, self.static
        codes, apart, kept, v_codes, centre, half, v_apart, v_kept = self.parts
        k = self._values_of(codes, static[f"key_{LEVELS}"], spec.bits, shape.heads * shape.keys)
        k = k * static[HALF].flatten() + static[CENTRE].flatten()
        k = k.scatter(2, apart.long(), kept.float())
        v = self._values_of(v_codes, static[f"value_{LEVELS}"], spec.value_bits, shape.heads * shape.values)
        v = (v * half.float() + centre.float()).scatter(2, v_apart.long(), v_kept.float())
        for number in range(spec.sinks):
            place = self.padding.long() + number
            rows = (place < self.length).nonzero()[:, 0]
            for sink, x in zip(self.sinks, (k, v), strict=True):
                x[rows, place[rows]] = sink[rows, number].float()
        keys = heads_of(k, shape.heads)
        if self.turn is not None:
            keys = self.turn.rotate(keys, *self.turn.table.at(self.index))
        return keys.to(self.dtype), heads_of(v, shape.heads).to(self.dtype)

    def keep(self, tokens: int) -> None:
        if tokens == 0 or not self.parts:
            self.parts, self.sinks, self.turn = [], [], None
            self.index, self.padding = self.index[:, :0].clone(), self.padding[:0].clone()
            return
        self.parts = [x[:, :tokens].clone() for x in self.parts]
        self.index = self.index[:, :tokens].clone()

    def select(self, rows: Tensor) -> None:
        at = rows.to(self.padding.device)
        self.parts = [x.index_select(0, at) for x in self.parts]
        self.sinks = [x.index_select(0, at) for x in self.sinks]
        self.padding = self.padding.index_select(0, at)
        self.index = self.index.index_select(0, at) if len(self.index) else self.index

    def tensors(self) -> list[Tensor]:
        return [*self.parts, *self.sinks, self.padding, self.index]


@dataclass(frozen=True)
class KvquantSpec(CodecSpec):
    """bits, value_bits: of keys and of values; outliers: share of a token's entries that are kept apart, as they are;
    sinks: first tokens that stay plain; turned: whether keys are rotated by position, so that each token needs the
    number of its rotation."""

    kind: ClassVar[str] = "kvquant"

    bits: int
    value_bits: int
    outliers: float = 0.01
    sinks: int = 1
    turned: bool = True

    def check(self, shape: CacheShape) -> None:
        """It stores any."""

    def turns(self) -> bool:
        return self.turned

    def stored(self, shape: CacheShape) -> Shapes:
        fixed: Shapes = dict.fromkeys((CENTRE, HALF), (torch.float32, (shape.heads, shape.keys)))
        return {
            **fixed,
            f"key_{LEVELS}": (torch.float32, (2, 1 << self.bits)),
            f"value_{LEVELS}": (torch.float32, (2, 1 << self.value_bits)),
        }

    def make(self, shape: CacheShape, tensors: Tensors) -> CacheCodec:
        return KvquantCodec(self, shape, tensors)

    def size_bits(self, tokens: int, shape: CacheShape, item: int) -> int:
        if tokens == 0:
            return 0
        each, start = 0, 8 * INDEX.itemsize
        for width, bits in ((shape.heads * shape.keys, self.bits), (shape.heads * shape.values, self.value_bits)):
            each += 8 * row_bytes(width, bits)
            each += outliers(self.outliers, width) * (8 * index_type(width).itemsize + item)
            start += self.sinks * width * item
        each += 2 * 8 * SCALE.itemsize + (8 * INDEX.itemsize if self.turned else 0)
        return tokens * each + start
