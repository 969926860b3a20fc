"""The native layout, `quant_method: "lilliput"`: holds what no engine's own layout can. See docs/native-format.md.

transformers loads it after `import lilliput`; linears stay packed and are decoded one layer at a time. Without the
import the load stops at a foreign shape instead of running on random weights. vLLM decodes it at load (`engines/`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lilliput.anatomy.widths import sizes_of
from lilliput.export.outcome import Outcome
from lilliput.export.packing import dense
from lilliput.parts import kept
from lilliput.parts.dense import DenseSpec
from lilliput.parts.layer import Layer
from lilliput.parts.linear import LinearSpec, plain_config
from lilliput.parts.part import PartSpec
from lilliput.parts.pattern import PatternSpec
from lilliput.runtime import int8

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def spec_of(outcome: Outcome) -> LinearSpec | None:
    """The native description; None where the linear is a plain tensor.

    A linear that is pruned and nothing else stores the kept weights and their places, one that is quantized besides
    their codes. Dense experts are native too: the
    engine's 3-D expert tensors are assembled from all experts of a layer or from none.
    """
    scheme = outcome.scheme
    if not scheme.parts:
        values = _values(outcome)
        if isinstance(values, DenseSpec) and not outcome.expert and scheme.activation is None:
            return None
        scheme = replace(scheme, parts=(values,))
    elif (compact := _coded(outcome)) is not None:
        scheme = replace(scheme, parts=(compact,))
    return LinearSpec(
        outcome.name,
        outcome.stored,
        outcome.out_features,
        outcome.in_features,
        scheme,
        outcome.transposed,
        "embedding" if outcome.embedding else "linear",
        outcome.also,
    )


def _values(outcome: Outcome) -> PartSpec:
    """How the weights of a linear without parts are stored: dense, unless leaving its zeros out takes fewer bytes."""
    shape = outcome.out_features, outcome.in_features
    return kept.spec_of(*shape, outcome.dtype, outcome.pattern, outcome.kept, outcome.places)


def _coded(outcome: Outcome) -> PatternSpec | None:
    """How a linear that is pruned to a pattern and quantized is stored without its zeros, where that is possible."""
    form = outcome.scheme.weights.integer
    return None if form is None else kept.coded_spec(form, outcome.pattern, outcome.in_features)


def _compact(outcome: Outcome) -> bool:
    """Whether it is pruned and stored without its zeros."""
    if _coded(outcome) is not None:
        return True
    return not outcome.scheme.parts and not isinstance(_values(outcome), DenseSpec)


class Native:
    """Writes native folders."""

    name = "lilliput"

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        for x in outcomes:
            if x.expert and x.transposed:
                return f"expert '{x.name}' is stored transposed, which the runtime cannot assemble; leave it dense."
        return None

    def describe(self, outcome: Outcome) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        spec = spec_of(outcome)
        if spec is None:
            return {f"{outcome.stored}.weight": (outcome.dtype, outcome.dense_shape)}
        return spec.describe()

    def pack(self, outcome: Outcome, layer: Layer) -> dict[str, Tensor]:
        spec = spec_of(outcome)
        if spec is None:
            return {f"{outcome.stored}.weight": dense(outcome, layer)}
        if not outcome.scheme.parts:
            layer = replace(layer, parts=(kept.part_of(layer, _values(outcome)),))
        elif (compact := _coded(outcome)) is not None:
            layer = replace(layer, parts=(kept.coded_part(layer, compact),))
        return {spec.payload + suffix: x for suffix, x in spec.scheme.pack(layer).items()}

    def pack_rows(self, outcome: Outcome, layer: Layer, start: int) -> dict[str, Tensor]:
        return self.pack(replace(outcome, out_features=len(layer.weight)), layer)

    def config(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> dict[str, Any] | None:
        specs = {x.stored: spec for x in outcomes if (spec := spec_of(x)) is not None}
        return plain_config(specs) if specs or sizes_of(config) else None

    def dense_note(self, outcomes: Sequence[Outcome]) -> str | None:
        notes = []
        specs = [spec for x in outcomes if (spec := spec_of(x)) is not None]
        if specs:
            served = (
                "vLLM does not: it would leave the rounding of inputs out."
                if any(spec.scheme.activation is not None for spec in specs)
                else "vLLM, with Lilliput beside it and --load-format lilliput, decodes them at load."
            )
            notes.append(
                f"transformers reads this folder after `import lilliput`: weights stay packed in memory. {served}"
            )
        factored = sum(spec.scheme.product is not None for spec in specs)
        if factored:
            notes.append(f"{factored} linears are products of two factors and run as two thin products.")
        masked = sum(not x.expert and kept.apart(spec.scheme) for x in outcomes if (spec := spec_of(x)) is not None)
        if masked:
            notes.append(
                f"{masked} linears multiply a few tokens, as in decoding, with their kept weights alone (on a CPU, "
                "with numba), and are decoded for more."
            )
        integers = sum(int8.forms(spec.scheme) is not None for spec in specs)
        if integers:
            notes.append(f"{integers} linears multiply 8-bit integers on a CPU.")
        if factored + masked + integers < len(specs):
            which = "Every other" if factored or masked or integers else "Each"
            notes.append(
                f"{which} linear is decoded for its forward pass and multiplied dense, which saves memory but no time."
            )
        compact = sum(_compact(x) for x in outcomes)
        if compact:
            notes.append(f"{compact} pruned linears store only the weights that are kept, and their places.")
        zeros = sum((x.sparsity or 0) > 0 and not _compact(x) for x in outcomes)
        if zeros:
            notes.append(
                f"The zeros of {zeros} pruned linears are stored as values: engines run them dense, "
                "and the file gains nothing from them."
            )
        return " ".join(notes) or None
