"""compressed-tensors, `pack-quantized`: integer codes in 32-bit words, read by transformers, vLLM and SGLang.

Tensors of a linear with b bits (names after the linear's own):
`weight_packed` int32 [out, ceil(in b / 32)], `weight_scale` [out, groups], `weight_shape` int64 [2] and, asymmetric,
`weight_zero_point` int32 [ceil(out b / 32), groups], packed along rows. Codes and zero points are signed. A grid per
tensor is written as one scale per row, which decodes to the same values.

Weight-only 8 bits are packed too; beside rounded inputs they are `int-quantized` (`rounded_inputs.py`).
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
from lilliput.export import rounded_inputs
from lilliput.export.dense import dense_linears
from lilliput.export.outcome import Outcome, largest_group
from lilliput.export.packing import dense, quantized_part
from lilliput.formats.bits import pack_words
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.layer import Layer
from lilliput.source.names import single_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CHUNK = 1 << 20  # codes packed at a time: they are widened to 64 bits, several times over


@dataclass(frozen=True)
class Setting:
    """What the engine's config tells of a linear. group: -1 one scale per output row, as which a grid per tensor is
    written too; inputs: their grid, where they are rounded."""

    bits: int
    symmetric: bool
    group: int
    inputs: UniformInput | None = None


def setting_of(outcome: Outcome) -> Setting | None:
    """None where the linear stays dense."""
    form, inputs = outcome.codes, outcome.scheme.activation
    if form is None:
        return None
    group = -1 if form.group_size == 0 else form.group_size
    return Setting(form.bits, form.symmetric, group, inputs if isinstance(inputs, UniformInput) else None)


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
            if (reason := rounded_inputs.refuse(x, self.decoded)) is not None:
                return reason
            if x.scheme.parts and x.codes is None:
                return (
                    f"'{x.name}' becomes {x.scheme.describe()}, and engines read only plain integers. "
                    "Nearest: rtn or gptq with format int; export 'lilliput' holds it."
                )
            if x.places != "bits" and not x.scheme.parts:
                return (
                    f"the kept weights of '{x.name}' go into {x.places}, which engines do not read. Nearest: places "
                    "bits, whose zeros are stored as values here; export 'lilliput' holds both."
                )
        quantized = [x for x in outcomes if x.codes is not None]
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
            if x.codes is not None and x.ragged:
                group = largest_group(quantized)
                instead = f"group_size {group} divides every width" if group else "group_size 'channel' always fits"
                return (
                    f"groups of {x.codes.group_size} do not divide the {x.in_features} inputs of '{x.name}'. "
                    f"Nearest: {instead}; export 'lilliput' holds the shorter last group."
                )
            if x.codes is not None and not _widens(x.codes.scale_dtype, x.dtype):
                model, scale = (str(d).removeprefix("torch.") for d in (x.dtype, x.codes.scale_dtype))
                return (
                    f"'{x.name}' is {model} with {scale} scales, which engines cast to {model}: every weight would "
                    f"change. Nearest: scale_dtype {model}; export 'lilliput' keeps other scales."
                )
        return _refuse_together(outcomes, quantized, self.decoded) or _refuse_fused(outcomes, config)

    def describe(self, outcome: Outcome) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        stored, rows, width, fmt = outcome.stored, outcome.out_features, outcome.in_features, outcome.codes
        if fmt is None:
            return {f"{stored}.weight": (outcome.dtype, outcome.dense_shape)}
        own = {stored + suffix: x for suffix, x in rounded_inputs.described(outcome).items()}
        if f"{stored}.weight" in own:
            return own
        groups = 1 if fmt.group_size <= 0 else width // fmt.group_size
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"{stored}.weight_packed": (torch.int32, (rows, math.ceil(width * fmt.bits / 32))),
            f"{stored}.weight_scale": (fmt.scale_dtype, (rows, groups)),
            f"{stored}.weight_shape": (torch.int64, (2,)),
        }
        if not fmt.symmetric:
            tensors[f"{stored}.weight_zero_point"] = (torch.int32, (math.ceil(rows * fmt.bits / 32), groups))
        return tensors | own

    def pack(self, outcome: Outcome, layer: Layer) -> dict[str, Tensor]:
        stored, fmt = outcome.stored, outcome.codes
        if fmt is None:
            return {f"{stored}.weight": dense(outcome, layer)}
        part = quantized_part(outcome, layer)
        own = {stored + suffix: x for suffix, x in rounded_inputs.packed(outcome, part, layer.activation).items()}
        if f"{stored}.weight" in own:
            return own
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
        return tensors | own

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

        members: dict[Setting, list[Outcome]] = {}
        for x in outcomes:
            if (setting := setting_of(x)) is not None:
                members.setdefault(setting, []).append(x)
        if not members:
            return None
        groups = {}
        for i, (setting, alike) in enumerate(members.items()):
            args = QuantizationArgs(
                num_bits=setting.bits,
                type="int",
                symmetric=setting.symmetric,
                strategy="channel" if setting.group < 0 else "group",
                group_size=None if setting.group < 0 else setting.group,
            )
            groups[f"group_{i}"] = QuantizationScheme(
                targets=["Linear"] if len(members) == 1 else exact_targets(alike),
                weights=args,
                input_activations=None if setting.inputs is None else rounded_inputs.args(setting.inputs),
                format=rounded_inputs.layout(alike[0]),
            )
        layouts = {rounded_inputs.layout(alike[0]) for alike in members.values()}
        built = QuantizationConfig(
            config_groups=groups,
            format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=dense_linears(outcomes, config),
        )
        entry: dict[str, Any] = built.model_dump(mode="json", exclude_none=True)
        if self.decoded or any(not x.symmetric for x in members):
            # transformers 5.23.0 gives an unpacked shape to zero points unless it decodes while loading
            entry["dequantize"] = True
        return entry

    def dense_note(self, outcomes: Sequence[Outcome]) -> str | None:
        quantized = [x for x in outcomes if x.codes is not None]
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
    kinds = {setting_of(x): x.name for x in quantized}
    asymmetric = any(x is not None and not x.symmetric for x in kinds)
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
    if quantized and len({setting_of(x) for x in experts}) > 1:
        return (
            f"'{experts[0].name}' and other experts differ in bits or group: engines read all experts with one "
            "setting. "
            "Nearest: one target for all experts; export 'lilliput' holds mixed settings."
        )
    if quantized and any(x.codes is None for x in experts):
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
    formats = [x.codes for x in quantized if x.codes is not None]
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
        kinds: dict[str, Setting | None] = {}
        for x in quantized:
            parent, _, leaf = x.name.rpartition(".")
            if leaf in names and kinds.setdefault(parent, setting_of(x)) != setting_of(x):
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
