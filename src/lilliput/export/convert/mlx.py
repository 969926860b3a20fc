"""MLX's affine groups, as mlx-lm reads them: integers for Apple's processors (and, slowly, others).

Tensors of a linear with b bits (names after the linear's own): `weight` uint32 [out, in b / 32], unsigned codes packed
along the inputs, least significant bits first, `scales` and `biases` [out, groups] of one type; value = scale * code +
bias. A bias is minus the zero point times the scale: of a symmetric grid that is a power of two times the scale, which
16 bits hold; of others it takes float32 as a rule, and then MLX computes in float32. Names are transformers' own, and
mlx-lm carries its models' few differences out while it loads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.export.convert import Converted, Wanted, folder
from lilliput.export.convert.coded import Coded, in_place, linears
from lilliput.export.convert.folder import Contents, Item
from lilliput.export.convert.room import Room
from lilliput.export.outcome import Outcome
from lilliput.formats.integer import pack_codes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPES = ("default", "linear", "llama3")
MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
ROOM = Room(
    "mlx", "mlx-lm", (2, 3, 4, 5, 6, 8), groups=(32, 64, 128), row=False, tables=True, head=True, models=MODELS
)  # fmt: skip


@dataclass(frozen=True)
class MlxConverter:
    """Writes folders for mlx-lm."""

    name = ROOM.name

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        kind = _rope(config).get("rope_type", "default")
        if config.model_type in MODELS and kind not in ROPES:
            return (
                f"its rotary embedding is of type '{kind}', and {', '.join(ROPES)} are written. Nearest: gguf or gptq"
            )
        return ROOM.refuse(outcomes, config)

    def convert(self, source_folder: Path, out: Path, wanted: Wanted) -> Converted:
        wanted.only(self.name)
        source, found = folder.admitted(source_folder, out, self)
        coded = linears(source, found)
        in_place(coded, self.name)
        kinds = [_kind(x) for x in coded]
        items = [
            Item(_layout(x, kind), lambda x=x, kind=kind: _tensors(x, kind))  # type: ignore[misc]
            for x, kind in zip(coded, kinds, strict=True)
        ]
        done = [x.outcome for x in coded]
        plain = list(folder.carried(source, done))
        entry = _quantization(coded)
        config = folder.config_of(source, entry, max(set(kinds), key=kinds.count))
        notes = _notes(coded, kinds, plain)
        config |= {"quantization": entry} | rope_entries(source.config)
        contents = Contents([*items, *plain], config, self.name, _USE, notes, _METADATA)
        return folder.delivered(out, self.name, source, done, contents)


def _rope(config: PretrainedConfig) -> Mapping[str, Any]:
    """What the config tells of rotary embeddings."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found


def rope_entries(config: PretrainedConfig) -> dict[str, Any]:
    """The same by the names that mlx-lm reads, which has defaults of its own where it finds none."""
    told = _rope(config)
    entries: dict[str, Any] = {"rope_theta": told["rope_theta"]} if "rope_theta" in told else {}
    return entries if told.get("rope_type", "default") == "default" else entries | {"rope_scaling": dict(told)}


_METADATA = {"format": "mlx"}
_USE = ("from mlx_lm import load", "", 'model, tokenizer = load("DIR")')


def _half(x: Coded) -> int:
    """What unsigned codes of the container are above the signed ones."""
    return 1 << (ROOM.code_bits(x.form.bits) - 1)


def _scale_and_bias(x: Coded) -> tuple[Tensor, Tensor]:
    """Both [out, groups], float64, exact."""
    scale, zero = x.grid(ROOM.group(x.outcome))
    wide = scale.double()
    below = torch.full_like(wide, _half(x)) if zero is None else zero.double() + _half(x)
    return wide, -below * wide


def _kind(x: Coded) -> torch.dtype:
    """The type of scales and biases: the first that holds both as they are. Raises PlanError where none does."""
    both = _scale_and_bias(x)
    first = x.outcome.dtype if x.outcome.dtype.itemsize == 2 else torch.float16
    for kind in dict.fromkeys((first, torch.float16, torch.bfloat16, torch.float32)):
        if all(bool((value.to(kind).double() == value).all()) for value in both):
            return kind
    raise PlanError(
        f"'{x.outcome.name}' has scales whose products with zero points no type of mlx holds. "
        "Nearest: compress again with target.scale_dtype float16"
    )


def _notes(coded: Sequence[Coded], kinds: Sequence[torch.dtype], plain: Sequence[Item]) -> tuple[str, ...]:
    notes = []
    wide = sum(kind == torch.float32 for kind in kinds)
    others = {dtype for item in plain for dtype, shape in item.tensors.values() if len(shape) > 0}
    if wide:
        notes.append(
            f"{wide} linears have zero points whose products with the scales take float32, and MLX computes them in "
            "float32: symmetric grids are faster there"
        )
    elif len(types := {*kinds, *others}) > 1:
        names = " and ".join(sorted(str(x).removeprefix("torch.") for x in types))
        notes.append(f"the folder holds {names}, and MLX computes in the wider type that both go into")
    wider = Counter(x.form.bits for x in coded if ROOM.code_bits(x.form.bits) != x.form.bits)
    for bits, count in sorted(wider.items()):
        notes.append(f"{count} linears have {bits} bits and take {ROOM.code_bits(bits)}: the layout has no {bits}")
    return tuple(notes)


def _layout(x: Coded, kind: torch.dtype) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
    base, grid = x.outcome.stored, (x.rows, x.width // ROOM.group(x.outcome))
    return {
        f"{base}.weight": (torch.uint32, (x.rows, x.width * ROOM.code_bits(x.form.bits) // 32)),
        f"{base}.scales": (kind, grid),
        f"{base}.biases": (kind, grid),
    }


def _tensors(x: Coded, kind: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    base = x.outcome.stored
    yield f"{base}.weight", pack_codes(x.codes(), ROOM.code_bits(x.form.bits)).view(x.rows, -1).view(torch.uint32)
    scale, bias = _scale_and_bias(x)
    yield f"{base}.scales", scale.to(kind)
    yield f"{base}.biases", bias.to(kind)


def _quantization(coded: Sequence[Coded]) -> dict[str, Any]:
    """The entry of config.json: the grid of most linears, and that of each other one by its name."""
    grids = {x.outcome.stored: (ROOM.group(x.outcome), ROOM.code_bits(x.form.bits)) for x in coded}
    most, _ = Counter(grids.values()).most_common(1)[0]
    entry: dict[str, Any] = {"group_size": most[0], "bits": most[1], "mode": "affine"}
    own = {name: {"group_size": grid[0], "bits": grid[1]} for name, grid in grids.items() if grid != most}
    return entry | own


CONVERTER = MlxConverter()
