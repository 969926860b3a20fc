"""Rotations that an engine applies around a linear while it runs (compressed-tensors' `transform_config`), undone.

A folder whose linears are rotated holds W' = U^-1 W V, and the engine multiplies their inputs and outputs by the rest.
Read as plain weights they have to be what the engine computes: the rotations of inputs and outputs go into the weight.
Rotations of weights lie in the files already. The library's own code would hold each rotation as a float64 matrix,
which grows with the square of the width and is in no plan; `hadamard.transform` multiplies by the same ones,
Sylvester's, without a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from compressed_tensors.utils.match import is_match
from pydantic import ValidationError
from torch import Tensor, nn

from lilliput.algebra.hadamard import transform
from lilliput.errors import SourceError
from lilliput.source.packed import CHUNK, Cast, Packed
from lilliput.source.reader import Reader

_WITHIN = ("input", "output")  # of a linear, so that its weight can absorb them
_ATTENTION = ("q_attn", "k_cache")


@dataclass(frozen=True)
class Turn:
    """One rotation around a linear, as it has to be applied to the stored weight: `order` inputs, or outputs, that lie
    side by side are turned together. Sylvester's matrix is its own inverse."""

    order: int
    inputs: bool

    def __call__(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] (or [out, 1], a bias), float64; turned outputs are whole multiples of `order`."""
        side = weight if self.inputs else weight.T
        rotated = transform(side.reshape(len(side), -1, self.order)).reshape(side.shape)
        return rotated if self.inputs else rotated.T


@dataclass(frozen=True)
class Turned:
    """A weight [out, in], or a bias [out], of a linear between rotations: `inner` with `turns` applied, in float64."""

    inner: Packed
    turns: tuple[Turn, ...]
    rotations: tuple[str, ...]  # stored tensors of the rotations, of no use any more

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.inner.parts, *self.rotations)

    def decode(self, reader: Reader, rows: tuple[int, int] | None = None) -> Tensor:
        """The values in `dtype`, or those of rows [start, stop)."""
        first, last = rows or (0, self.shape[0])
        mixed = max((turn.order for turn in self.turns if not turn.inputs), default=1)  # rows that are turned together
        start, stop = first // mixed * mixed, -(-last // mixed) * mixed
        values = self.inner.decode(reader, (start, stop))
        flat = values.reshape(len(values), -1)
        out = torch.empty_like(flat)
        # A piece at a time: of rows, or where inputs stay apart of columns. Turned as a whole on both sides it is one.
        axis = int(not any(turn.inputs for turn in self.turns))
        step = max(CHUNK // flat.shape[1 - axis], 1) if axis else max(CHUNK // flat.shape[1] // mixed, 1) * mixed
        for at in range(0, flat.shape[axis], step):
            size = min(step, flat.shape[axis] - at)
            piece = flat.narrow(axis, at, size).double()
            for turn in self.turns:
                piece = turn(piece)
            out.narrow(axis, at, size).copy_(piece)
        return out.reshape(values.shape)[first - start : last - start].contiguous()


def undo(reader: Reader, raw: Mapping[str, Any], packed: Mapping[str, Packed], label: str) -> dict[str, Packed]:
    """`packed` (logical name -> how to decode it) with the rotations that the config tells of taken into account.

    Raises SourceError for rotations whose matrices no formula gives, and for those that no weight can absorb.
    """
    if not raw.get("transform_config"):
        return dict(packed)
    try:
        config = TransformConfig.model_validate(raw["transform_config"])
    except (ValidationError, ValueError) as error:
        raise SourceError(
            f"{label}: compressed-tensors cannot read its transform_config: {str(error).splitlines()[0]}."
        ) from error
    groups = config.config_groups.items()
    online = [(name, scheme, args) for name, scheme in groups for args in scheme.apply if args.is_online()]
    for name, scheme, args in online:
        _check(name, scheme, args, label)
    result = dict(packed)
    for base, weight in _linears(reader, packed).items():
        shape = (weight.shape[0], weight.shape[1])
        turns = []
        for name, scheme, args in online:
            if args.location in _WITHIN and is_match(base, _class_of(base), args.targets, args.ignore):
                inputs = args.location == "input"
                order = scheme.head_dim or shape[inputs]
                if order & (order - 1) or shape[inputs] % order:
                    raise _refusal(name, f"compressed-tensors has no Hadamard matrix of {order} for {base}", label)
                turns.append(Turn(order, inputs))
        if not turns:
            continue
        rotations = tuple(
            x for x in reader.entries for name, _, args in online if x.startswith(f"{base}.{name}_{args.location}.")
        )
        result[f"{base}.weight"] = Turned(weight, tuple(turns), rotations)
        outer = tuple(x for x in turns if not x.inputs)
        bias = reader.entries.get(f"{base}.bias")
        if outer and bias is not None:
            result[f"{base}.bias"] = Turned(Cast(bias.shape, bias.dtype, f"{base}.bias"), outer, ())
    return result


def _check(name: str, scheme: TransformScheme, args: TransformArgs, label: str) -> None:
    """Raises SourceError for a rotation that cannot be undone here."""
    why = None
    if scheme.type != "hadamard" or scheme.randomize:
        kind = "randomized" if scheme.randomize else f"of type '{scheme.type}'"
        why = f"its matrix is {kind}, and only that of 'hadamard' follows from a formula"
    elif args.location in _ATTENTION:
        pair = [x for x in scheme.apply if x.location in _ATTENTION]
        even = {(tuple(x.targets), tuple(x.ignore), x.inverse) for x in pair}
        if {x.location for x in pair} != set(_ATTENTION) or len(even) != 1:  # of both alike it changes no product
            why = f"it turns {args.location} alone, which no weight can absorb"
    if why is not None:
        raise _refusal(name, why, label)


def _refusal(name: str, why: str, label: str) -> SourceError:
    return SourceError(
        f"{label}: the rotation '{name}' of its transform_config, which an engine applies while it runs, cannot be "
        f"undone: {why}. Start from the unquantized model, which its model card names."
    )


def _linears(reader: Reader, packed: Mapping[str, Packed]) -> dict[str, Packed]:
    """Every matrix of the files by the name of its module."""
    matrices = {name.removesuffix(".weight"): x for name, x in packed.items() if len(x.shape) == 2}
    used = {part for x in packed.values() for part in x.parts}
    for name, entry in reader.entries.items():
        base = name.removesuffix(".weight")
        if base != name and name not in used and len(entry.shape) == 2:
            matrices.setdefault(base, Cast(entry.shape, entry.dtype, name))
    return matrices


def _class_of(base: str) -> nn.Module:
    """A module of the class that targets such as "Linear" mean; files do not tell, but embeddings are called so."""
    leaf = base.rsplit(".", 1)[-1]
    if "embed" in leaf or leaf in ("wte", "wpe"):
        return nn.Embedding(1, 1, device="meta")
    return nn.Linear(1, 1, bias=False, device="meta")
