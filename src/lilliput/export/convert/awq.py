"""AWQ's layout, `quant_method: awq`, version gemm, read by vLLM, SGLang and AutoAWQ.

Tensors of a linear (names after the linear's own): `qweight` int32 [in, out / 8], 4-bit codes packed along the outputs
in the order 0, 2, 4, 6, 1, 3, 5, 7, `qzeros` int32 [groups, out / 8], zero points packed likewise, `scales` float16
[groups, out]; value = (code - zero) * scale with unsigned codes. Symmetric grids have zero points of 8. The layout says
nothing of how codes came about: any integers in groups that it has room for go in, not AWQ's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.export.convert import Converted, Wanted, folder
from lilliput.export.convert.coded import Coded, halves, in_place, linears
from lilliput.export.convert.folder import Contents, Item
from lilliput.export.convert.room import Room
from lilliput.export.dense import dense_linears
from lilliput.export.outcome import Outcome
from lilliput.formats.integer import pack_codes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROOM = Room("awq", "vLLM, SGLang, AutoAWQ", (4,), mixed=False, steps=(8, 1))
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqConverter:
    """Writes folders in AWQ's layout."""

    name = ROOM.name

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        return ROOM.refuse(outcomes, config)

    def convert(self, source_folder: Path, out: Path, wanted: Wanted) -> Converted:
        wanted.only(self.name)
        source, found = folder.admitted(source_folder, out, self)
        coded = linears(source, found)
        in_place(coded, self.name)
        halves(coded, (torch.float16,), self.name)
        items = [Item(_layout(x), lambda x=x: _tensors(x)) for x in coded]  # type: ignore[misc]
        done = [x.outcome for x in coded]
        config = folder.config_of(source, _config(done, source.config), torch.float16)
        narrow = sum(x.form.bits < BITS for x in coded)
        notes = (f"{narrow} linears have fewer than 4 bits and take 4: the layout has no others",) if narrow else ()
        contents = Contents([*items, *folder.carried(source, done)], config, self.name, _USE, notes)
        return folder.delivered(out, self.name, source, done, contents)


_USE = ("from vllm import LLM", "", 'model = LLM("DIR")')


def _layout(x: Coded) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    base = x.outcome.stored
    return {
        f"{base}.qweight": (torch.int32, (x.width, x.rows // 8)),
        f"{base}.qzeros": (torch.int32, (x.groups, x.rows // 8)),
        f"{base}.scales": (torch.float16, (x.groups, x.rows)),
    }


def _tensors(x: Coded) -> Iterator[tuple[str, Tensor]]:
    base = x.outcome.stored
    yield f"{base}.qweight", _packed(x.codes())
    scale, zero = x.grid()
    yield f"{base}.qzeros", _packed(torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero)
    yield f"{base}.scales", scale.T.to(torch.float16).contiguous()


def _packed(codes: Tensor) -> Tensor:
    """Signed codes int8 [out, columns] as int32 [columns, out / 8]."""
    columns = codes.T.reshape(codes.shape[1], -1, 8)[:, :, list(ORDER)].reshape(codes.shape[1], -1)
    return pack_codes(columns, BITS).view(codes.shape[1], -1).view(torch.int32)


def _config(done: Sequence[Outcome], config: PretrainedConfig) -> dict[str, Any]:
    """The entry of config.json."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": ROOM.group(done[0]),
        "zero_point": True,
        "modules_to_not_convert": dense_linears(done, config),
    }


CONVERTER = AwqConverter()
