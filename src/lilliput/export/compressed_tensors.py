"""compressed-tensors, `pack-quantized`: integer codes in 32-bit words, read by transformers, vLLM and SGLang.

Tensors of a linear with b bits (names after the linear's own):
`weight_packed` int32 [out, ceil(in b / 32)], `weight_scale` [out, groups], `weight_shape` int64 [2] and, asymmetric,
`weight_zero_point` int32 [ceil(out b / 32), groups], packed along rows. Codes and zero points are signed. A grid per
tensor is written as one scale per row, which decodes to the same values.

Weight-only 8 bits are packed too: engines take the library's `int-quantized` layout for 8-bit activations.
What loads, and how exactly, is measured: `capabilities.json`, made by scripts/check_capabilities.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.anatomy.wrapper import skeleton
from lilliput.export.dense import dense_linears
from lilliput.export.outcome import Outcome, largest_group
from lilliput.export.packing import dense, quantized_part
from lilliput.formats.bits import pack_words
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.layer import Layer
from lilliput.source.names import single_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHUNK = 1 << 20  # codes packed at a time: they are widened to 64 bits, several times over
IntegerKind = tuple[int, bool, int]  # bits, symmetric, group size (-1: one per output row)


def kind_of(form: IntegerFormat) -> IntegerKind:
    """What the engine's config tells of a format; a grid per tensor is written per row."""
    return (form.bits, form.symmetric, -1 if form.group_size == 0 else form.group_size)


@dataclass(frozen=True)
class CompressedTensors:
    """Writes `pack-quantized` folders.

    decoded: the folder asks transformers to decode while it loads. Its models then keep plain weights, which some of
    them cannot do without; vLLM and SGLang pass over the request.
    """

    decoded: bool = False

    name = "compressed-tensors"

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        for x in outcomes:
            if x.scheme.parts and x.format is None:
                return (
                    f"'{x.name}' becomes {x.scheme.describe()}, and engines read only plain integers. "
                    "Nearest: rtn or gptq with format int; export 'lilliput' holds it."
                )
            if x.places != "bits" and not x.scheme.parts:
                return (
                    f"the kept weights of '{x.name}' go into {x.places}, which engines do not read. Nearest: places "
                    "bits, whose zeros are stored as values here; export 'lilliput' holds both."
                )
        quantized = [x for x in outcomes if x.format is not None]
        for x in quantized:
            if x.transposed:
                return (
                    f"'{x.name}' is a Conv1D, stored as [in, out], which engines do not expect. "
                    "Nearest: export 'lilliput', which holds it."
                )
            if x.embedding:
                return (
                    f"'{x.name}' is an embedding, and no engine tested can hold a packed one. "
                    "Nearest: exclude 'embed' from every step; export 'lilliput' holds it."
                )
            if x.router:
                return (
                    f"'{x.name}' decides which experts a token uses, and engines have no place for its packed "
                    "weights. Nearest: exclude 'router' from every step; export 'lilliput' holds it."
                )
            if x.format is not None and x.ragged:
                group = largest_group(quantized)
                instead = f"group_size {group} divides every width" if group else "group_size 'channel' always fits"
                return (
                    f"groups of {x.format.group_size} do not divide the {x.in_features} inputs of '{x.name}'. "
                    f"Nearest: {instead}; export 'lilliput' holds the shorter last group."
                )
            if x.format is not None and not _widens(x.format.scale_dtype, x.dtype):
                model, scale = (str(d).removeprefix("torch.") for d in (x.dtype, x.format.scale_dtype))
                return (
                    f"'{x.name}' is {model} with {scale} scales, which engines cast to {model}: every weight would "
                    f"change. Nearest: scale_dtype {model}; export 'lilliput' keeps other scales."
                )
        return _refuse_together(outcomes, quantized, self.decoded) or _refuse_fused(outcomes, config)

    def describe(self, outcome: Outcome) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        stored, rows, width, fmt = outcome.stored, outcome.out_features, outcome.in_features, outcome.format
        if fmt is None:
            return {f"{stored}.weight": (outcome.dtype, outcome.dense_shape)}
        groups = 1 if fmt.group_size <= 0 else width // fmt.group_size
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"{stored}.weight_packed": (torch.int32, (rows, math.ceil(width * fmt.bits / 32))),
            f"{stored}.weight_scale": (fmt.scale_dtype, (rows, groups)),
            f"{stored}.weight_shape": (torch.int64, (2,)),
        }
        if not fmt.symmetric:
            tensors[f"{stored}.weight_zero_point"] = (torch.int32, (math.ceil(rows * fmt.bits / 32), groups))
        return tensors

    def pack(self, outcome: Outcome, layer: Layer) -> dict[str, Tensor]:
        stored, fmt = outcome.stored, outcome.format
        if fmt is None:
            return {f"{stored}.weight": dense(outcome, layer)}
        part = quantized_part(outcome, layer)
        rows, width = part.codes.shape
        step = max(1, CHUNK // width)
        packed = torch.empty(rows, math.ceil(width * fmt.bits / 32), dtype=torch.int32)
        for start in range(0, rows, step):
            packed[start : start + step] = pack_words(part.codes[start : start + step], fmt.bits)
        per_row = fmt.group_size == 0
        scale = part.grid.scale.expand(rows, -1) if per_row else part.grid.scale
        tensors = {
            f"{stored}.weight_packed": packed,
            f"{stored}.weight_scale": scale.to(fmt.scale_dtype).contiguous(),
            f"{stored}.weight_shape": torch.tensor([rows, width], dtype=torch.int64),
        }
        if part.grid.zero is not None:
            zero = part.grid.zero.expand(rows, -1) if per_row else part.grid.zero
            tensors[f"{stored}.weight_zero_point"] = pack_words(zero.T.contiguous(), fmt.bits).T.contiguous()
        return tensors

    def pack_rows(self, outcome: Outcome, layer: Layer, start: int) -> dict[str, Tensor]:
        tensors = self.pack(replace(outcome, out_features=len(layer.weight)), layer)
        shape = f"{outcome.stored}.weight_shape"
        if shape in tensors and start:
            del tensors[shape]
        elif shape in tensors:
            tensors[shape] = torch.tensor([outcome.out_features, outcome.in_features], dtype=torch.int64)
        return tensors

    def config(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> dict[str, Any] | None:
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )

        members: dict[IntegerKind, list[Outcome]] = {}
        for x in outcomes:
            if x.format is not None:
                members.setdefault(kind_of(x.format), []).append(x)
        if not members:
            return None
        groups = {}
        for i, ((bits, symmetric, size), alike) in enumerate(members.items()):
            args = QuantizationArgs(
                num_bits=bits,
                type="int",
                symmetric=symmetric,
                strategy="channel" if size < 0 else "group",
                group_size=None if size < 0 else size,
            )
            targets = ["Linear"] if len(members) == 1 else exact_targets(alike)
            groups[f"group_{i}"] = QuantizationScheme(targets=targets, weights=args, format="pack-quantized")
        built = QuantizationConfig(
            config_groups=groups,
            format="pack-quantized",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=dense_linears(outcomes, config),
        )
        entry: dict[str, Any] = built.model_dump(mode="json", exclude_none=True)
        if self.decoded or any(not symmetric for _, symmetric, _ in members):
            # transformers 5.23.0 gives an unpacked shape to zero points unless it decodes while loading
            entry["dequantize"] = True
        return entry

    def dense_note(self, outcomes: Sequence[Outcome]) -> str | None:
        quantized = [x for x in outcomes if x.format is not None]
        zeros = [x for x in outcomes if (x.sparsity or 0) > 0]
        notes: list[str] = []
        if quantized:
            notes.append(
                "On a CPU transformers decodes every linear at load or at the first forward pass and then runs dense: "
                "the file is smaller, the running model is not."
            )
            notes.extend(_tolerances(quantized, self.decoded))
        if zeros:
            notes.append(
                f"The zeros of {len(zeros)} pruned linears are stored as values: engines run them dense, "
                "and the file gains nothing from them."
            )
        return " ".join(notes) or None


def _refuse_together(outcomes: Sequence[Outcome], quantized: Sequence[Outcome], decoded: bool) -> str | None:
    """What each linear could have by itself and an engine does not load side by side."""
    kinds = {kind_of(x.format): x.name for x in quantized if x.format is not None}
    asymmetric = any(not symmetric for _, symmetric, _ in kinds)
    experts = [x for x in outcomes if x.expert]
    if asymmetric and experts:
        return (
            f"asymmetric integers in a model with experts ('{experts[0].name}') load in no engine version tested. "
            "Nearest: symmetric: true; export 'lilliput' holds zero points."
        )
    if (asymmetric or decoded) and len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        return (
            f"'{first}' and '{second}' differ in bits, symmetry or group, and a loader that decodes uses one "
            f"setting for all. Nearest: one target for all linears{'' if decoded else ', or symmetric: true'}; "
            "export 'lilliput' holds mixed settings."
        )
    if quantized and len({None if x.format is None else kind_of(x.format) for x in experts}) > 1:
        return (
            f"'{experts[0].name}' and other experts differ in bits or group: engines read all experts with one "
            "setting. "
            "Nearest: one target for all experts; export 'lilliput' holds mixed settings."
        )
    if quantized and any(x.format is None for x in experts):
        return (
            f"expert '{experts[0].name}' stays dense beside quantized linears, and a loader that decodes while loading "
            "drops it. Nearest: include the experts; export 'lilliput' holds the mixture."
        )
    return None


def _refuse_fused(outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
    expert = next((x for x in outcomes if x.expert), None)
    if expert is None or single_name(f"{expert.name}.weight", skeleton(config)) is not None:
        return None
    return (
        f"'{expert.name}' is part of a tensor that engines read as a whole: it has no file name of its own. "
        "Nearest: leave the experts out of every step; export 'lilliput' holds them one by one."
    )


def _widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of one dtype is a value of the other."""
    return narrow == wide or wide == torch.float32


def _tolerances(quantized: Sequence[Outcome], decoded: bool) -> list[str]:
    """Where transformers decodes in the dtype of the scales instead of the model's."""
    formats = [x.format for x in quantized if x.format is not None]
    eager = decoded or any(not f.symmetric for f in formats) or any(x.expert for x in quantized)
    notes = []
    if eager and any(f.scale_dtype != torch.float32 for f in formats):
        which = "the linears" if decoded else "zero points and experts"
        notes.append(
            f"transformers decodes {which} in the dtype of the scales: loaded in a wider dtype, "
            "each weight is rounded once to that dtype."
        )
    split = _split_siblings(quantized)
    if split is not None:
        notes.append(f"vLLM runs the linears of {split} as one and needs one setting for them: it refuses this file.")
    bits = {f.bits for f in formats}
    if not bits <= {4, 8}:
        notes.append("SGLang reads only 4 and 8 bits; vLLM reads 2 to 8 symmetric, and 4 and 8 asymmetric.")
    if bits != {4} and bits:
        notes.append("vLLM on a CPU has kernels for 4 bits alone, and refuses this file there.")
    if any(x.table for x in quantized):
        notes.append("vLLM has no place for a packed head, and refuses this file; it serves export 'lilliput'.")
    return notes


def _split_siblings(quantized: Sequence[Outcome]) -> str | None:
    """The first set of linears that vLLM fuses (q/k/v, gate/up) and that differ in bits, symmetry or group, in
    words."""
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        kinds: dict[str, IntegerKind] = {}
        for x in quantized:
            parent, _, leaf = x.name.rpartition(".")
            if (
                leaf in names
                and x.format is not None
                and kinds.setdefault(parent, kind_of(x.format)) != kind_of(x.format)
            ):
                return f"{parent} ({', '.join(names)})"
    return None


def exact_targets(outcomes: Sequence[Outcome]) -> list[str]:
    """Anchored patterns, as the library marks them, of these linears' module names and file names."""
    return [f"re:{x}" for x in patterns({name for x in outcomes for name in (x.name, x.stored)})]


def patterns(names: Iterable[str]) -> list[str]:
    """Anchored patterns that match these names, block numbers folded together.

    Experts follow one scheme, so their own numbers may be any.
    """
    folded: dict[str, set[str]] = {}
    for name in names:
        shape, number = _split_block(name)
        folded.setdefault(shape, set()).add(number)
    targets = []
    for shape, numbers in sorted(folded.items()):
        choice = "|".join(sorted(numbers, key=lambda n: (len(n), n)))
        head, _, tail = re.escape(shape).partition("\0")
        body = head + (f"(?:{choice})" if choice else "") + tail
        targets.append("^" + re.sub(r"(\\\.experts\\\.)\d+(\\\.)", r"\1\\d+\2", body) + "$")
    return sorted(set(targets))


def _split_block(name: str) -> tuple[str, str]:
    """("model.layers.\\0.mlp.up", "12") of model.layers.12.mlp.up; no number: (name, "")."""
    match = re.search(r"\.(\d+)(?=\.)", name)
    if match is None:
        return name, ""
    return f"{name[: match.start(1)]}\0{name[match.end(1) :]}", match.group(1)
