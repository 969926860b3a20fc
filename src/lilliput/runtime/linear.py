"""CompressedLinear: a linear, or an embedding, that keeps its packed tensors and is decoded while it runs.

The module keeps its class: it becomes a subclass whose `weight` is a property, so its own forward pass computes what it
always did, and an nn.Linear, a Conv1D or a model's variant of either needs no copy of its arithmetic. Four kinds of
linears run without being decoded: products of factors, 8-bit weights with 8-bit inputs, and, while there are few
tokens, binary codes and kept weights under a bit mask. Code that reads `module.weight` gets the decoded tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lilliput.algebra import products
from lilliput.formats import binary
from lilliput.formats.format import CHUNK
from lilliput.formats.integer import IntegerFormat, pack_codes
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.kept import apart
from lilliput.parts.linear import LinearSpec, decode, decode_rows, divides
from lilliput.parts.lowrank import LowRankSpec
from lilliput.parts.part import below
from lilliput.parts.scheme import prefix
from lilliput.runtime import inputs, int8, lut

PREFIX = "packed_"  # the buffers hold bytes, so that casting the model does not touch scales
APART = 16  # rows between two that are looked up, from where on they are decoded apart
OUTPUTS = 1 << 13  # of a head, computed at a time
STARTS = "row_starts"  # of a mask: where each row's values begin
MARKER = "packed_dtype"  # an empty tensor that follows `model.to(...)`: the dtype to decode to, and the device


class CompressedLinear(nn.Module):
    """Mixed in before the linear's own class by `compress_`."""

    spec: LinearSpec

    @property
    def weight(self) -> Tensor:
        """The decoded weight, [out, in] or [in, out] as the linear's class has it, in the dtype of the model.

        Until `fill` it has a shape and no values, and is marked so that transformers draws no random weights into it.
        """
        marker: Tensor = getattr(self, MARKER)
        if f"{PREFIX}0" not in self._buffers:
            shape = self.spec.out_features, self.spec.in_features
            empty = torch.empty(shape[::-1] if self.spec.transposed else shape, dtype=marker.dtype, device="meta")
            empty._is_hf_initialized = True  # type: ignore[attr-defined]
            return empty
        dense = decode(self.spec, self.stored, marker.dtype)
        return dense.T.contiguous() if self.spec.transposed else dense

    def stored(self, name: str) -> Tensor:
        """A stored tensor by its stored name: a view of its bytes."""
        described = self.spec.describe()
        dtype, shape = described[name]
        raw: Tensor = getattr(self, f"{PREFIX}{list(described).index(name)}")
        return raw.view(dtype).view(shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the decoded weight, of a linear whose scheme divides."""
        marker: Tensor = getattr(self, MARKER)
        return decode_rows(
            self.spec, lambda name, span: self.stored(name)[span[0] : span[1]], start, stop, marker.dtype
        )

    def share(self, other: CompressedLinear) -> None:
        """Take the packed tensors of another module, which stay one and the same."""
        for index in range(len(self.spec.describe())):
            self.register_buffer(f"{PREFIX}{index}", getattr(other, f"{PREFIX}{index}"), persistent=False)
        marker: Tensor = getattr(self, MARKER)
        self.register_buffer(MARKER, marker.to(getattr(other, MARKER).device), persistent=False)
        self._round_inputs()

    def fill(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the tensors that the description names, onto `device`."""
        for index, name in enumerate(self.spec.describe()):
            raw = tensors[name].contiguous().reshape(-1).view(torch.uint8).to(device)
            self.register_buffer(f"{PREFIX}{index}", raw, persistent=False)
        marker: Tensor = getattr(self, MARKER)
        self.register_buffer(MARKER, torch.empty(0, dtype=marker.dtype, device=device), persistent=False)
        self._round_inputs()

    def _round_inputs(self) -> None:
        rounding = inputs.described(self.spec, lambda name: CompressedLinear.stored(self, name))
        if rounding is not None:
            inputs.attach(self, rounding)


class LookedUp(CompressedLinear):
    """An embedding of which only the rows that are looked up are decoded."""

    _table: Tensor | None = None
    padding_idx: int | None

    @property
    def weight(self) -> Tensor:
        """The rows that are being looked up; outside the forward pass the whole table, decoded."""
        if self._table is not None:
            return self._table
        return CompressedLinear.weight.fget(self)  # type: ignore[attr-defined, no-any-return]

    def forward(self, ids: Tensor) -> Tensor:
        used, places = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        padding, self.padding_idx = self.padding_idx, None
        self.__dict__["_table"] = self._decoded(used)
        try:  # the module's own forward pass, which may scale what it looks up, on the rows that occur
            rows: Tensor = super().forward(places)
        finally:
            del self.__dict__["_table"]
            self.padding_idx = padding
        return rows

    def _decoded(self, used: Tensor) -> Tensor:
        """Rows `used` int64 [n] (ascending, each once)."""
        ends = (used.diff() > APART).nonzero()[:, 0] + 1
        pieces = []
        for group in used.tensor_split(ends.cpu()):
            if len(group):
                first = int(group[0])
                pieces.append(self.rows(first, int(group[-1]) + 1)[group - first])
        marker: Tensor = getattr(self, MARKER)
        return torch.cat(pieces) if pieces else marker.new_empty(0, self.spec.in_features)


class ChunkedLinear(CompressedLinear):
    """A head: its outputs are computed a few thousand at a time, and no more of its rows are decoded at once."""

    def forward(self, x: Tensor) -> Tensor:
        count = self.spec.out_features
        bias: Tensor | None = getattr(self, "bias", None)
        out = x.new_empty(*x.shape[:-1], count)
        for a in range(0, count, OUTPUTS):
            b = min(count, a + OUTPUTS)
            some = None if bias is None else bias[a:b]
            out[..., a:b] = nn.functional.linear(x, self.rows(a, b), some)
        return out


class FactoredLinear(CompressedLinear):
    """A linear that is one product of factors: two thin products take its place, and nothing is decoded dense."""

    def forward(self, x: Tensor) -> Tensor:
        marker: Tensor = getattr(self, MARKER)
        spec, part = self.spec, self.spec.scheme.product
        if part is None:
            raise TypeError(f"{spec.name} is {spec.scheme.describe()}, not a product of factors")
        get = below(self.stored, spec.payload)
        left, right = part.factors(get, spec.out_features, spec.in_features, marker)
        bias: Tensor | None = getattr(self, "bias", None)
        return nn.functional.linear(nn.functional.linear(x, right), left, bias)


class TabledLinear(CompressedLinear):
    """A binary-coded linear that holds bit planes, as many bytes as the file does.

    A few tokens on a CPU, as in decoding, are multiplied through tables of partial sums, in float32; for more of them,
    and elsewhere, the weight is decoded.
    """

    @property
    def weight(self) -> Tensor:
        if f"{PREFIX}0" not in self._buffers:
            return CompressedLinear.weight.fget(self)  # type: ignore[attr-defined, no-any-return]
        marker: Tensor = getattr(self, MARKER)
        spec, form, grid, planes = self.spec, self._form(), self._grid(), self._planes()
        dense = torch.empty(spec.out_features, spec.in_features, dtype=marker.dtype, device=planes.device)
        step = max(1, CHUNK // spec.in_features)
        for a in range(0, spec.out_features, step):
            dense[a : a + step] = form.decode(lut.codes_of(planes[:, a : a + step]), grid.rows(a, a + step))
        return dense.T.contiguous() if spec.transposed else dense

    def stored(self, name: str) -> Tensor:
        if name == self.spec.payload:
            planes = self._planes()
            return pack_codes(lut.codes_of(planes), len(planes))
        return super().stored(name)

    def fill(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().fill(tensors, device)
        spec, form = self.spec, self._form()
        get = below(super().stored, spec.payload)
        codes, _ = form.unpack(get, spec.out_features, spec.in_features, 0, spec.out_features)
        self.register_buffer(f"{PREFIX}0", lut.planes(codes, form.bits).view(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        planes = self._planes()
        tokens = x.numel() // self.spec.in_features
        if x.device.type != "cpu" or planes.device.type != "cpu" or tokens * len(planes) > lut.LOOKS or not tokens:
            output: Tensor = super().forward(x)
            return output
        out = lut.matmul(x.reshape(tokens, -1).float(), planes, self._grid())
        bias: Tensor | None = getattr(self, "bias", None)
        out = out if bias is None else out + bias.float()
        return out.view(*x.shape[:-1], -1).to(x.dtype)

    def _form(self) -> binary.BinaryFormat:
        form = lut.form_of(self.spec.scheme, self.spec.in_features)
        if form is None:
            raise TypeError(f"{self.spec.name} is {self.spec.scheme.describe()}, which no tables serve")
        return form

    def _planes(self) -> Tensor:
        raw: Tensor = getattr(self, f"{PREFIX}0")
        return raw.view(-1, self.spec.out_features, self.spec.in_features // lut.INPUTS)

    def _grid(self) -> binary.BinaryGrid:
        get = below(super().stored, self.spec.payload)
        return binary.BinaryGrid(get("_alpha"), get("_offset"))


class MaskedLinear(CompressedLinear):
    """A pruned linear that holds its kept weights and their bit mask, as the file does, and where each row begins.

    A few tokens on a CPU, as in decoding, are multiplied with the kept weights as they are, in float32, and products
    that compensate for the pruning are added as two thin ones; for more tokens, with gradients and elsewhere, the
    weight is decoded. It takes numba (the extra `fast`); without it every pass decodes.
    """

    _product: tuple[Tensor, products.Product] | None = None

    @property
    def weight(self) -> Tensor:
        # numba takes memory that a check of the folder, which runs many tokens, has not planned: the first pass of few
        # tokens loads it.
        if self._product is None or not self._ready() or len(self.spec.scheme.parts) > 1:
            return CompressedLinear.weight.fget(self)  # type: ignore[attr-defined, no-any-return]
        marker: Tensor = getattr(self, MARKER)
        get = below(self.stored, self.spec.payload)
        dense = products.spread(get(""), get("_mask"), getattr(self, STARTS), self.spec.in_features).to(marker.dtype)
        return dense.T.contiguous() if self.spec.transposed else dense

    def fill(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().fill(tensors, device)
        begin = products.starts(self.stored(f"{self.spec.payload}_mask"))
        self.register_buffer(STARTS, begin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // self.spec.in_features
        bias: Tensor | None = getattr(self, "bias", None)
        learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if not tokens or x.device.type != "cpu" or learns or not self._ready() or tokens > products.most():
            output: Tensor = super().forward(x)
            return output
        spec, flat = self.spec, x.detach().reshape(tokens, -1).float()
        out = self._kept()(flat)
        for number, part in enumerate(spec.scheme.parts[1:], 1):
            if not isinstance(part, LowRankSpec):
                raise TypeError(f"{spec.name} is {spec.scheme.describe()}, of which only products are added to a mask")
            get = below(self.stored, spec.payload + prefix(number))
            left, right = part.factors(get, spec.out_features, spec.in_features, flat)
            out += nn.functional.linear(nn.functional.linear(flat, right), left)
        out = out if bias is None else out + bias.detach().float()
        return out.view(*x.shape[:-1], -1).to(x.dtype)

    def _ready(self) -> bool:
        """Whether it is filled, on the CPU, and numba is there."""
        held = self._buffers.get(STARTS)
        return held is not None and held.device.type == "cpu" and products.available()

    def _kept(self) -> products.Product:
        """The product with the kept weights, made anew where the module's tensors have moved."""
        values: Tensor = getattr(self, f"{PREFIX}0")
        if self._product is None or self._product[0] is not values:
            get = below(self.stored, self.spec.payload)
            self.__dict__["_product"] = values, products.Product(get(""), get("_mask"), getattr(self, STARTS))
        assert self._product is not None
        return self._product[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_product"}


class IntegerLinear(CompressedLinear):
    """A linear of 8-bit weights whose inputs are rounded to 8 bits: on a CPU, without gradients, codes are
    multiplied. The kernel keeps a copy of the codes, so that both take the room of 16-bit weights.

    Elsewhere inputs are rounded, and the decoded weight multiplies floats.
    """

    _rounding: inputs.Rounding | None = None
    _integers: tuple[Tensor, int8.Weights] | None = None

    def _round_inputs(self) -> None:
        self.__dict__["_rounding"] = inputs.described(self.spec, lambda name: CompressedLinear.stored(self, name))

    def forward(self, x: Tensor) -> Tensor:
        rounding, bias = self._rounding, getattr(self, "bias", None)
        payload: Tensor = getattr(self, f"{PREFIX}0")
        learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        tokens = x.numel() // self.spec.in_features
        usable = x.device.type == "cpu" and payload.device.type == "cpu" and int8.available()
        if rounding is None or learns or not tokens or not usable:
            output: Tensor = super().forward(x if rounding is None else rounding.of(x))
            return output
        _, grid = self._forms()
        flat = x.detach().reshape(tokens, -1).float()
        # The kernel rounds by itself; zero points are added to whole numbers.
        codes = grid.steps if grid.symmetric else grid.codes
        out = self._weights(payload).times(*codes(flat, rounding.grid.tensors.__getitem__))
        out = out if bias is None else out.add_(bias.detach().float())
        return out.view(*x.shape[:-1], -1).to(x.dtype)

    def _forms(self) -> tuple[IntegerFormat, UniformInput]:
        forms = int8.forms(self.spec.scheme)
        if forms is None:
            raise TypeError(f"{self.spec.name} is {self.spec.scheme.describe()}, which has no integer product")
        return forms

    def _weights(self, payload: Tensor) -> int8.Weights:
        """What the kernel multiplies with, made at the first pass and anew where the module's tensors have moved."""
        if self._integers is None or self._integers[0] is not payload:
            spec, (form, _) = self.spec, self._forms()
            get = below(self.stored, spec.payload)
            codes, grid = form.unpack(get, spec.out_features, spec.in_features, 0, spec.out_features)
            self.__dict__["_integers"] = payload, int8.Weights.of(codes, grid.scale.reshape(-1))
        assert self._integers is not None
        return self._integers[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_integers"}


def kept_apart(kind: type, spec: LinearSpec) -> bool:
    """Whether a linear of this class multiplies few tokens by kept weights alone: a bit mask, and on top of it products
    of factors or nothing."""
    return kind in (nn.Linear, Conv1D) and apart(spec.scheme)


def tabled(kind: type, spec: LinearSpec) -> bool:
    """Whether a linear of this class multiplies few tokens through tables."""
    return kind in (nn.Linear, Conv1D) and lut.form_of(spec.scheme, spec.in_features) is not None


def factored(kind: type, spec: LinearSpec) -> bool:
    """Whether a linear of this class runs as two thin products; other classes than the two plain ones may compute more
    than a product."""
    return kind in (nn.Linear, Conv1D) and spec.scheme.product is not None


def _mixin(kind: type, spec: LinearSpec) -> type:
    if issubclass(kind, nn.Embedding):
        return LookedUp
    tall = spec.kind == "embedding" or spec.out_features > OUTPUTS
    if kind is nn.Linear and tall and divides(spec.scheme, spec.out_features, spec.in_features):
        return ChunkedLinear
    if kind in (nn.Linear, Conv1D) and int8.forms(spec.scheme) is not None:
        return IntegerLinear
    if tabled(kind, spec):
        return TabledLinear
    if kept_apart(kind, spec):
        return MaskedLinear
    return FactoredLinear if factored(kind, spec) else CompressedLinear


def compress_(module: nn.Module, spec: LinearSpec) -> None:
    """Turn a linear into a compressed one, in place. It is empty until `fill`; its bias stays as it is."""
    weight = module._parameters.pop("weight")
    shape = (spec.in_features, spec.out_features) if spec.transposed else (spec.out_features, spec.in_features)
    if weight is None or tuple(weight.shape) != shape:
        actual = None if weight is None else tuple(weight.shape)
        raise ValueError(f"{spec.name} is {actual} in the model and {shape} in config.json")
    module.__class__ = _subclass(type(module), _mixin(type(module), spec))  # type: ignore[arg-type]
    module.spec = spec  # type: ignore[assignment]
    module.register_buffer(MARKER, torch.empty(0, dtype=weight.dtype, device="cpu"), persistent=False)


@functools.cache
def _subclass(kind: type, mixin: type) -> type:
    return type(f"{mixin.__name__.removesuffix('Linear')}{kind.__name__}", (mixin, kind), {})
