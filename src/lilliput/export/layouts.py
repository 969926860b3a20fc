"""The layouts of compressed-tensors, by the grid of the weights and by whether inputs are rounded beside them.

pack-quantized        integers in 32-bit words
int-quantized         8-bit integers, one a byte, which engines multiply with inputs of 8 bits
float-quantized       e4m3 with a scale for each row, beside inputs that are rounded to e4m3
naive-quantized       the same weights alone
nvfp4-pack-quantized  e2m1 in groups of 16, with scales e4m3 and one float32 for the matrix
mxfp4-pack-quantized  e2m1 in groups of 32, with scales that are powers of two
mxfp8-quantized       e4m3 in such groups
"""

from __future__ import annotations

from lilliput.formats.format import Format
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.scales import FloatScales, PowerScales, SmallFloatScales

PACKED, WHOLE = "pack-quantized", "int-quantized"
FLOAT, ALONE = "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
PAIRS = {NVFP4, MXFP4}  # two codes a byte
BLOCKS = PAIRS | {MXFP8}


def of(form: Format, rounded: bool) -> str | None:
    """The layout that holds weights on this grid beside inputs that are `rounded` or not; None where none does."""
    if isinstance(form, IntegerFormat):
        return WHOLE if rounded and form.bits == 8 else PACKED
    if not isinstance(form, LevelFormat):
        return None
    if isinstance(form.scales, FloatScales):
        held = form.table == "e4m3" and form.group_size <= 0
        return (FLOAT if rounded else ALONE) if held else None
    kind = (form.table, form.group_size)
    if isinstance(form.scales, SmallFloatScales):
        return NVFP4 if kind == ("e2m1", 16) else None
    if isinstance(form.scales, PowerScales):
        return {("e2m1", 32): MXFP4, ("e4m3", 32): MXFP8}.get(kind)
    return None


def nearest(form: Format | None) -> str:
    """What to ask for instead of weights that no layout holds."""
    table = form.table if isinstance(form, LevelFormat) else ""
    return {
        "e4m3": "format fp8 with group_size channel, or mxfp8",
        "e5m2": "format fp8",
        "e2m1": "format nvfp4 or mxfp4",
    }.get(table, "rtn or gptq with format int")
