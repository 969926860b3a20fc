"""compressed-tensors: folders that transformers, vLLM and SGLang read.

Weights are integers (`integers.py`) or small floats (`small_floats.py`), with or without rounded inputs beside them
(`rounded_inputs.py`), in the layout that `layouts.py` names. What loads, and how exactly, is measured:
`capabilities.json`, made by scripts/check_capabilities.py, and docs/engines.md for vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.anatomy.wrapper import skeleton
from lilliput.export import engine_notes, integers, layouts, rounded_inputs, small_floats
from lilliput.export.dense import dense_linears
from lilliput.export.outcome import Outcome, largest_group
from lilliput.export.packing import dense, quantized_part
from lilliput.export.settings import Setting, decoded_at_load, setting_of
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.layer import Layer
from lilliput.source.names import single_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of a table that is packed in pieces, what tells of all rows.
_ONCE = (".weight_shape", ".weight_global_scale", ".input_scale", ".input_zero_point", ".input_global_scale")


@dataclass(frozen=True)
class CompressedTensors:
    """Writes folders of compressed-tensors.

    decoded: the folder asks transformers to decode while it loads. Its models then keep plain weights, which some of
    them cannot do without; vLLM and SGLang pass over the request.
    """

    decoded: bool = False

    name = "compressed-tensors"

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        because = decoded_at_load(outcomes)
        for x in outcomes:
            if (reason := rounded_inputs.refuse(x, self.decoded, because)) is not None:
                return reason
            if x.scheme.parts and x.codes is None:
                return (
                    f"'{x.name}' becomes {x.scheme.describe()}, and engines read only plain integers, fp8, mxfp4, "
                    f"mxfp8 and nvfp4. Nearest: {layouts.nearest(x.scheme.weights.grid)}; export 'lilliput' holds it."
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
                if not isinstance(x.codes, IntegerFormat):
                    instead = "format fp8, with a scale for each row, always fits"
                return (
                    f"groups of {x.codes.group_size} do not divide the {x.in_features} inputs of '{x.name}'. "
                    f"Nearest: {instead}; export 'lilliput' holds the shorter last group."
                )
            plain = x.scale_dtype
            if plain is not None and not _widens(plain, x.dtype):
                model, scale = (str(d).removeprefix("torch.") for d in (x.dtype, plain))
                return (
                    f"'{x.name}' is {model} with {scale} scales, which engines cast to {model}: every weight would "
                    f"change. Nearest: scale_dtype {model}; export 'lilliput' keeps other scales."
                )
        return _refuse_together(outcomes, quantized, self.decoded) or _refuse_fused(outcomes, config)

    def describe(self, outcome: Outcome) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        form, layout = outcome.codes, outcome.layout
        if form is None or layout is None:
            return {f"{outcome.stored}.weight": (outcome.dtype, outcome.dense_shape)}
        shape = outcome.out_features, outcome.in_features
        if isinstance(form, IntegerFormat):
            own = integers.described(form, layout, *shape)
        else:
            own = small_floats.described(form, *shape)
        return {outcome.stored + suffix: x for suffix, x in (own | rounded_inputs.described(outcome)).items()}

    def pack(self, outcome: Outcome, layer: Layer) -> dict[str, Tensor]:
        form, layout = outcome.codes, outcome.layout
        if form is None or layout is None:
            return {f"{outcome.stored}.weight": dense(outcome, layer)}
        part = quantized_part(outcome, layer)
        if isinstance(form, IntegerFormat):
            own = integers.packed(form, layout, part)
        else:
            own = small_floats.packed(form, part)
        return {outcome.stored + suffix: x for suffix, x in (own | rounded_inputs.packed(layer.activation)).items()}

    def pack_rows(self, outcome: Outcome, layer: Layer, start: int) -> dict[str, Tensor]:
        tensors = self.pack(replace(outcome, out_features=len(layer.weight)), layer)
        shape = f"{outcome.stored}.weight_shape"
        if start:
            return {name: x for name, x in tensors.items() if not name.endswith(_ONCE)}
        if shape in tensors:
            tensors[shape] = torch.tensor([outcome.out_features, outcome.in_features], dtype=torch.int64)
        return tensors

    def config(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> dict[str, Any] | None:
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

        members: dict[Setting, list[Outcome]] = {}
        for x in outcomes:
            if (setting := setting_of(x)) is not None:
                members.setdefault(setting, []).append(x)
        if not members:
            return None
        groups = {}
        for i, (setting, alike) in enumerate(members.items()):
            groups[f"group_{i}"] = QuantizationScheme(
                targets=["Linear"] if len(members) == 1 else exact_targets(alike),
                weights=_weights(setting),
                input_activations=None if setting.inputs is None else rounded_inputs.args(setting.inputs),
                format=setting.layout,
            )
        kinds = {setting.layout for setting in members}
        built = QuantizationConfig(
            config_groups=groups,
            format=kinds.pop() if len(kinds) == 1 else "mixed-precision",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=dense_linears(outcomes, config),
        )
        entry: dict[str, Any] = built.model_dump(mode="json", exclude_none=True)
        if self.decoded or decoded_at_load(outcomes) is not None:
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
            notes.extend(engine_notes.of(quantized, self.decoded))
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
    floats = next((x for x in experts if x.codes is not None and not isinstance(x.codes, IntegerFormat)), None)
    if floats is not None:
        return (
            f"expert '{floats.name}' becomes {floats.scheme.weights.describe()}, and small floats in experts were "
            "tried in no engine. Nearest: rtn or gptq with format int; export 'lilliput' holds it."
        )
    rounded = next((x for x in experts if x.scheme.activation is not None), None)
    if rounded is not None:
        return (
            f"the inputs of expert '{rounded.name}' become {rounded.scheme.activation.describe()}, and transformers "  # type: ignore[union-attr]
            "runs all experts as one tensor, which it decodes. Nearest: exclude the experts from the step that rounds "
            "inputs; export 'lilliput' holds it."
        )
    if (decoded or decoded_at_load(quantized) is not None) and len(kinds) > 1:
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


def _weights(setting: Setting) -> Any:
    if setting.layout in (layouts.PACKED, layouts.WHOLE):
        return integers.args(setting.bits, setting.symmetric, setting.group)
    return small_floats.args(setting.layout)


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
