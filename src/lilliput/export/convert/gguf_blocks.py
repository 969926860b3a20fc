"""Linears of a native folder as ggml's blocks, with the same values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats import ggml_bytes
from lilliput.formats.format import Format
from lilliput.formats.ggml import GgmlFormat
from lilliput.formats.ggml_bytes import KINDS, Blocks
from lilliput.formats.groups import index
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.scales import PowerScales
from lilliput.parts.quantized import QuantizedSpec
from lilliput.parts.scheme import Scheme

BLOCK = 32


def type_of(scheme: Scheme, rows: int, width: int) -> str | None:
    """The type (a name of ggml's, lower case) that holds what a scheme decodes to, as far as shapes say it; None: no
    type does."""
    form = _format(scheme)
    if isinstance(form, GgmlFormat):
        return form.name
    if width % BLOCK or form is None:
        return None
    if isinstance(form, LevelFormat) and (form.table, form.group_size) == ("e2m1", BLOCK):
        return "mxfp4" if isinstance(form.scales, PowerScales) else None
    if isinstance(form, IntegerFormat) and form.plain()["kind"] == "int" and form.symmetric:
        whole = form.group_size <= 0 or form.group_size % BLOCK == 0
        return ("q4_0" if form.bits <= 4 else "q5_0" if form.bits == 5 else "q8_0") if whole else None
    return None


def _format(scheme: Scheme) -> Format | None:
    if len(scheme.parts) != 1 or scheme.inputs or scheme.outputs or scheme.activation is not None:
        return None
    (part,) = scheme.parts
    return part.format if isinstance(part, QuantizedSpec) else None


def nearest_type(scheme: Scheme, rows: int, width: int) -> str:
    """A type of about as many bits a weight."""
    bits = scheme.size_bits(rows, width) / (rows * width)
    names = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
    sizes = {name: 8 * KINDS[name].bytes / KINDS[name].block for name in names}
    return min(names, key=lambda x: abs(sizes[x] - bits))


def blocks(
    scheme: Scheme, name: str, get: Callable[[str], Tensor], rows: int, width: int, start: int, stop: int
) -> Tensor:
    """Rows [start, stop) as blocks of the type that `type_of` names, uint8 [rows, bytes of a row]. `get` returns a
    stored tensor by suffix. Raises PlanError where a scale is none of float16."""
    form = _format(scheme)
    if isinstance(form, GgmlFormat):
        return get("").view(rows, -1)[start:stop]
    if form is None:
        raise PlanError(f"{name} is no single grid: GGUF cannot hold it")
    codes, grid = form.unpack(get, rows, width, start, stop)
    if isinstance(form, LevelFormat):
        return _mxfp4(codes, grid.codes)
    kind = KINDS[str(type_of(scheme, rows, width))]
    scale = grid.scale.float().expand(stop - start, -1)
    size = BLOCK if not isinstance(form, IntegerFormat) else form.group_size
    scale = scale[:, index(width, size)[::BLOCK]] if scale.shape[1] > 1 else scale.expand(-1, width // BLOCK)
    half = scale.half()
    if not torch.equal(half.float(), scale):
        raise PlanError(
            f"{name} has scales that float16 does not hold, as GGUF's blocks have them: compress again with "
            f"scale_dtype float16, or with format {nearest_type(scheme, rows, width)}"
        )
    return ggml_bytes.pack(kind, Blocks(codes, half.contiguous()))


def _mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """Levels of e2m1 by index less 8, exponents + 127 by group: a byte of exponent and 32 codes of sign and size."""
    rows = len(codes)
    level = codes.to(torch.int16) + 1  # 0 where the level is 0, as 15 levels have indices 0..14
    nibble = torch.where(level < 0, 8 - level, level).to(torch.uint8).view(rows, -1, 2, BLOCK // 2)
    both = nibble[:, :, 0] | nibble[:, :, 1] << 4
    return torch.cat((exponents.to(torch.uint8).unsqueeze(-1), both), -1).view(rows, -1)
