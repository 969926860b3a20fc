"""What a linear becomes, known before any weight is read: the specs of its parts and of the transforms around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lilliput.formats.format import Format, Stored
from lilliput.formats.integer import IntegerFormat
from lilliput.machine.cost import Cost
from lilliput.parts import known, transform
from lilliput.parts.inputs import known as inputs_known
from lilliput.parts.inputs.grid import InputSpec
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.part import PartSpec
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.transform import TransformSpec

ACTIVATION = "_activation"  # what the names of a grid for inputs begin with, after the payload's


@dataclass(frozen=True)
class Scheme:
    """y = outputs^-1 (sum of parts) inputs x. No parts: the linear stays a plain tensor. `activation`: the grid on
    which what the transforms make of x is rounded."""

    parts: tuple[PartSpec, ...] = ()
    inputs: tuple[TransformSpec, ...] = ()
    outputs: tuple[TransformSpec, ...] = ()
    activation: InputSpec | None = None

    @property
    def weights(self) -> Scheme:
        """What becomes of the weights alone."""
        return replace(self, activation=None)

    @property
    def integer(self) -> IntegerFormat | None:
        """The format of a linear that is one integer grid and nothing else."""
        return self.grid if isinstance(self.grid, IntegerFormat) else None

    @property
    def grid(self) -> Format | None:
        """The format of a linear that is codes of it and nothing else."""
        if len(self.parts) != 1 or self.inputs or self.outputs or self.activation is not None:
            return None
        (part,) = self.parts
        return part.format if isinstance(part, QuantizedSpec) else None

    @property
    def fills(self) -> bool:
        """Whether a part reaches every weight, so that pruned ones cannot stay 0."""
        return any(
            isinstance(part, LowRankSpec) or (isinstance(part, QuantizedSpec) and not part.format.holds_zero)
            for part in self.parts
        )

    @property
    def product(self) -> LowRankSpec | None:
        """The factors of a linear that is one product and nothing else: the runtime never forms it."""
        if len(self.parts) != 1 or self.inputs or self.outputs or self.activation is not None:
            return None
        return self.parts[0] if isinstance(self.parts[0], LowRankSpec) else None

    def describe(self) -> str:
        """For tables: "int4 g64 asym + rank 8 (float16)"."""
        around = dict.fromkeys(x.describe() for x in (*self.inputs, *self.outputs))
        words = " + ".join(x.describe() for x in self.parts) or "as it was"
        words = f"{words} in {', '.join(around)}" if around else words
        return words if self.activation is None else f"{words}, inputs {self.activation.describe()}"

    def size_bits(self, rows: int, width: int) -> int:
        """Exact size of a [rows, width] linear, without padding to bytes; transforms' stored tensors included."""
        around = self._around(rows, width)
        stored = sum(dtype.itemsize * 8 * shape[0] for dtype, shape in around.values())
        return stored + sum(part.size_bits(rows, width) for part in self.parts)

    def stored(self, rows: int, width: int) -> Stored:
        """All tensors of a [rows, width] linear by suffix of its payload's name; part i > 0 begins with "_i"."""
        tensors: Stored = {}
        for i, part in enumerate(self.parts):
            tensors |= {prefix(i) + suffix: x for suffix, x in part.stored(rows, width).items()}
        return tensors | self._around(rows, width)

    def _around(self, rows: int, width: int) -> Stored:
        """What is stored beside the parts."""
        around = transform.names("in", self.inputs, width) | transform.names("out", self.outputs, rows)
        own = {} if self.activation is None else self.activation.stored(width)
        return around | {f"{ACTIVATION}{suffix}": x for suffix, x in own.items()}

    def pack(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors that `stored` describes. ValueError: the layer has other parts or transforms."""
        actual = of(layer)
        if actual != self:
            raise ValueError(f"{layer.name} was planned as {self.describe()} and is {actual.describe()}")
        tensors: dict[str, Tensor] = {}
        for i, part in enumerate(layer.parts):
            tensors |= {prefix(i) + suffix: x for suffix, x in part.pack().items()}
        tensors |= transform.pack("in", layer.inputs) | transform.pack("out", layer.outputs)
        own = {} if layer.activation is None else layer.activation.pack()
        return tensors | {f"{ACTIVATION}{suffix}": x for suffix, x in own.items()}

    def cost(self, rows: int, width: int) -> Cost:
        """What compressing a [rows, width] linear into this takes beside a solver's own copies and products: formats'
        working memory, and copies of weights and Gram matrix (measured), since what is turned lies beside what it was
        made from, and each of several parts is taken from what the others leave over."""
        weights, grams = (2, 5) if self.inputs or self.outputs else (2, 1) if len(self.parts) > 1 else (0, 0)
        costs = [part.format.cost(rows, width) for part in self.parts if isinstance(part, QuantizedSpec)]
        ram = max((x.ram for x in costs), default=0) + 4 * width * (weights * rows + grams * width)
        return Cost(ram=ram, operations=sum(x.operations for x in costs))

    def operations(self, rows: int, width: int) -> int:
        """Multiplications and additions that decoding a [rows, width] linear to a plain weight takes."""
        parts = sum(part.operations(rows, width) for part in self.parts)
        into = rows * sum(x.operations(width) for x in self.inputs)
        return parts + into + width * sum(x.operations(rows) for x in self.outputs)

    def plain(self) -> dict[str, Any]:
        """The entry of config.json."""
        entry: dict[str, Any] = {"parts": [part.plain() for part in self.parts]}
        for side, specs in (("in", self.inputs), ("out", self.outputs)):
            if specs:
                entry[side] = [x.plain() for x in specs]
        if self.activation is not None:
            entry["activation"] = self.activation.plain()
        return entry


def quantized(form: Format | None) -> Scheme:
    """One part on the grid of a format; None: a plain tensor."""
    return Scheme() if form is None else Scheme((QuantizedSpec(form),))


def prefix(index: int) -> str:
    """What a part's number adds to the name of the linear's payload."""
    return f"_{index}" if index else ""


def of(layer: Layer) -> Scheme:
    """The scheme that a layer has."""
    return Scheme(
        tuple(part.spec for part in layer.parts),
        tuple(t.spec for t in layer.inputs),
        tuple(t.spec for t in layer.outputs),
        None if layer.activation is None else layer.activation.spec,
    )


def from_plain(plain: Mapping[str, Any]) -> Scheme:
    """Undo `Scheme.plain`. Raises SourceError for a kind that this code does not know."""
    inputs, outputs = (tuple(transform.from_plain(x) for x in plain.get(side, ())) for side in ("in", "out"))
    activation = plain.get("activation")
    return Scheme(
        tuple(known.from_plain(x) for x in plain["parts"]),
        inputs,
        outputs,
        None if activation is None else inputs_known.from_plain(activation),
    )
