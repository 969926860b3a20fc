"""compressed-tensors from a native folder whose linears are integers that it holds: for transformers, vLLM and SGLang.

The layout itself is `export.compressed_tensors`; its rules for what engines load hold here as they do for a plan, and
transformers opens the folder before it gets its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.anatomy.wrapper import opener
from lilliput.errors import PlanError
from lilliput.export.compressed_tensors import CompressedTensors
from lilliput.export.convert import Converted, Wanted, folder
from lilliput.export.convert.coded import Coded, linears, plain
from lilliput.export.convert.folder import Contents, Item
from lilliput.export.engine import look
from lilliput.export.folder import config_text
from lilliput.export.outcome import Outcome
from lilliput.formats.integer import IntegerGrid
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme
from lilliput.source.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYOUT = CompressedTensors()


@dataclass(frozen=True)
class CompressedTensorsConverter:
    """Writes `pack-quantized` folders."""

    name = LAYOUT.name

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        if not any(x.format is not None for x in outcomes):
            return "none of its linears is quantized to integers: compress it with rtn or gptq first"
        other = next((x for x in outcomes if x.codes is not None and x.format is None), None)
        if other is not None:
            return (
                f"'{other.name}' is {other.scheme.describe()}, and integers alone are copied. Nearest: compress the "
                "original with export 'compressed-tensors'"
            )
        return LAYOUT.refuse(values(outcomes), config)

    def convert(self, source_folder: Path, out: Path, wanted: Wanted) -> Converted:
        wanted.only(self.name)
        source, found = folder.admitted(source_folder, out, self)
        if source.quantization == self.name:
            raise PlanError(f"{source_folder} is a folder of compressed-tensors already: take it as it is")
        with folder.staged(out) as place:
            types, notes = write(place, source, values(found))
        return folder.converted(out, self.name, types, notes)


def values(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """The outcomes, those of plain values as the plain tensors that other layouts have."""
    return tuple(replace(x, scheme=Scheme()) if plain(x.scheme) else x for x in outcomes)


def write(place: Path, source: Source, found: Sequence[Outcome]) -> tuple[Counter[str], tuple[str, ...]]:
    """Write the folder `place`, the codes of all outcomes with a format. Returns bytes by dtype, and notes.

    Raises PlanError where transformers does not compute what the folder holds, in either form of the layout.
    """
    done = [x for x in found if x.format is not None]
    coded = linears(source, done)
    items = [Item(LAYOUT.describe(x.outcome), lambda x=x: _tensors(x)) for x in coded]  # type: ignore[misc]
    note = LAYOUT.dense_note(found)
    notes = () if note is None else (note,)
    auto = opener(source.config).__name__
    use = (f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("DIR")')
    contents = Contents(
        [*items, *folder.carried(source, done)], _config(source, found, LAYOUT), LAYOUT.name, use, notes
    )
    types = folder.write(place, source, done, contents)
    problems = look(place).problems
    if problems:
        decoded = _config(source, found, CompressedTensors(decoded=True))
        (place / "config.json").write_text(config_text(decoded), encoding="utf-8")
        if look(place).problems:
            raise PlanError(
                f"transformers does not compute what the folder would hold: {'; '.join(problems[:3])}. "
                "Nearest: keep the folder, whose layout does not depend on how engines read others"
            )
    return types, notes


def _config(source: Source, found: Sequence[Outcome], layout: CompressedTensors) -> dict[str, Any]:
    dtypes = Counter(x.dtype for x in source.stored.values())
    dtype = getattr(source.config, "dtype", None) or dtypes.most_common(1)[0][0]
    return folder.config_of(source, layout.config(found, source.config), dtype)


def _tensors(x: Coded) -> Iterator[tuple[str, Tensor]]:
    codes = x.codes()
    scale, zero = x.grid()
    if x.form.group_size == 0:
        scale, zero = scale[:1], None if zero is None else zero[:1]
    part = QuantizedPart(x.form, codes, IntegerGrid(scale, zero))
    yield from LAYOUT.pack(x.outcome, Layer(x.outcome.name, torch.empty(0), (part,))).items()


CONVERTER = CompressedTensorsConverter()
