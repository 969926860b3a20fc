"""GPTQ's layout, `quant_method: gptq`, read by vLLM, SGLang, GPTQModel and, with it, transformers.

Tensors of a linear with b bits (names after the linear's own): `qweight` int32 [in b / 32, out], codes packed along the
inputs, `qzeros` int32 [groups, out b / 32], zero points packed along the outputs, `scales` float16 or bfloat16
[groups, out], `g_idx` int32 [in], the group of each input; value = (code - zero) * scale with unsigned codes. 32 codes
fill b words, least significant bits first, also of 3 bits. The first format ("gptq") stores zero - 1, the second
("gptq_v2") zero; a zero point of 0 has no place in the first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.errors import PlanError, nearest
from lilliput.export.compressed_tensors import patterns
from lilliput.export.convert import Converted, Wanted, folder
from lilliput.export.convert.coded import Coded, halves, linears
from lilliput.export.convert.folder import Contents, Item
from lilliput.export.convert.room import Room
from lilliput.export.dense import dense_linears
from lilliput.export.outcome import Outcome
from lilliput.formats.integer import pack_codes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROOM = Room("gptq", "vLLM, SGLang, GPTQModel", (2, 3, 4, 8), head=True, steps=(32, 32))
_VLLM = (4, 8)  # bits that vLLM 0.32 runs, of symmetric grids
FORMATS = ("gptq", "gptq_v2")
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}  # as vLLM calls them
Grid = tuple[int, int, bool]  # bits, group size, symmetric


@dataclass(frozen=True)
class GptqConverter:
    """Writes folders in GPTQ's layout."""

    name = ROOM.name

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        return ROOM.refuse(outcomes, config)

    def convert(self, source_folder: Path, out: Path, wanted: Wanted) -> Converted:
        wanted.only(self.name, "checkpoint_format")
        source, found = folder.admitted(source_folder, out, self)
        coded = linears(source, found)
        kind = halves(coded, (torch.float16, torch.bfloat16), self.name)
        form = _format(coded, wanted.checkpoint_format)
        notes = _notes(coded, form, wanted.checkpoint_format)
        items = [Item(_layout(x, kind), lambda x=x: _tensors(x, kind, form)) for x in coded]  # type: ignore[misc]
        done = [x.outcome for x in coded]
        config = folder.config_of(source, _config(coded, source.config, form), kind)
        contents = Contents([*items, *folder.carried(source, done)], config, self.name, _USE, notes)
        return folder.delivered(out, self.name, source, done, contents)


_USE = ("from vllm import LLM", "", 'model = LLM("DIR")')


def _format(coded: Iterable[Coded], wanted: str | None) -> str:
    """The checkpoint's format: the wanted one, else the first where it holds all zero points.

    Raises PlanError for a name that is none, and for a zero point of 0 in the first.
    """
    if wanted is not None and wanted not in FORMATS:
        raise PlanError(f"GPTQ's layout has no checkpoint format '{wanted}'.{nearest(wanted, FORMATS)}")
    if wanted == "gptq_v2":
        return wanted
    for x in coded:
        zero = x.grid()[1]
        lowest = -(1 << (ROOM.code_bits(x.form.bits) - 1))
        if zero is not None and bool((zero == lowest).any()):
            if wanted is None:
                return "gptq_v2"
            raise PlanError(
                f"'{x.outcome.name}' has zero points of 0, and checkpoint format gptq stores zero points less 1. "
                "Nearest: --checkpoint-format gptq_v2"
            )
    return "gptq"


def _notes(coded: Sequence[Coded], form: str, wanted: str | None) -> tuple[str, ...]:
    notes = []
    if form != wanted and form == "gptq_v2":
        notes.append("zero points of 0 have no place in checkpoint format gptq: written as gptq_v2")
    if any(not x.form.symmetric or ROOM.code_bits(x.form.bits) not in _VLLM for x in coded):
        notes.append("vLLM (0.32) runs 4 and 8 symmetric bits of this layout and refuses this folder. Nearest: awq")
    wider = Counter(x.form.bits for x in coded if ROOM.code_bits(x.form.bits) != x.form.bits)
    for bits, count in sorted(wider.items()):
        notes.append(f"{count} linears have {bits} bits and take {ROOM.code_bits(bits)}: the layout has no {bits}")
    return tuple(notes)


def _layout(x: Coded, kind: torch.dtype) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    bits, base = ROOM.code_bits(x.form.bits), x.outcome.stored
    groups = x.groups
    return {
        f"{base}.qweight": (torch.int32, (x.width * bits // 32, x.rows)),
        f"{base}.qzeros": (torch.int32, (groups, x.rows * bits // 32)),
        f"{base}.scales": (kind, (groups, x.rows)),
        f"{base}.g_idx": (torch.int32, (x.width,)),
    }


def _tensors(x: Coded, kind: torch.dtype, form: str) -> Iterator[tuple[str, Tensor]]:
    bits, base = ROOM.code_bits(x.form.bits), x.outcome.stored
    words = pack_codes(x.codes(), bits).view(x.rows, -1).view(torch.int32)
    yield f"{base}.qweight", words.T.contiguous()
    scale, zero = x.grid()
    groups = scale.shape[1]
    stored = torch.zeros(groups, x.rows, dtype=torch.int16) if zero is None else zero.T.to(torch.int16)
    stored = stored - (1 if form == "gptq" else 0)
    yield f"{base}.qzeros", pack_codes(stored, bits).view(groups, -1).view(torch.int32)
    yield f"{base}.scales", scale.T.to(kind).contiguous()
    order = x.order()
    by_place = torch.arange(x.width, dtype=torch.int32) // (x.width // groups)
    yield f"{base}.g_idx", by_place if order is None else order


def _config(coded: Sequence[Coded], config: PretrainedConfig, form: str) -> dict[str, Any]:
    """The entry of config.json: the grid of most linears, and rules by name for the others and the dense ones."""
    members: dict[Grid, list[Outcome]] = {}
    for x in coded:
        members.setdefault(_grid(x), []).append(x.outcome)
    most = max(members, key=lambda grid: len(members[grid]))
    done = [x.outcome for x in coded]
    dense = [x for x in dense_linears(done, config) if not x.endswith("lm_head")]
    rules: dict[str, Any] = {f"-:{pattern}": {} for pattern in _patterns(dense)}
    for grid, of_grid in members.items():
        if grid != most:
            bits, group, symmetric = grid
            rule = {"bits": bits, "group_size": group, "sym": symmetric}
            rules |= {f"+:{pattern}": rule for pattern in _patterns([x.stored for x in of_grid])}
    entry: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": most[0],
        "group_size": most[1],
        "sym": most[2],
        "desc_act": any(x.order() is not None for x in coded),
        "checkpoint_format": form,
        "lm_head": any(x.outcome.table for x in coded),
        "pack_dtype": "int32",
    }
    return entry | ({"dynamic": rules} if rules else {})


def _grid(x: Coded) -> Grid:
    return ROOM.code_bits(x.form.bits), ROOM.group(x.outcome), x.form.symmetric


def _patterns(names: Sequence[str]) -> list[str]:
    """Anchored patterns of these linears, and of what vLLM calls several of them that it runs as one."""
    every = set(names)
    for parts, fused in _FUSED.items():
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if leaf == parts[0] and all(f"{parent}.{part}" in every for part in parts):
                every.add(f"{parent}.{fused}")
    return patterns(every)


CONVERTER = GptqConverter()
