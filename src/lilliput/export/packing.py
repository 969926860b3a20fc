"""From a compressed layer to what an exporter stores of it."""

from __future__ import annotations

from torch import Tensor

from lilliput.export.outcome import Outcome
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart


def quantized_part(outcome: Outcome, layer: Layer) -> QuantizedPart:
    """The layer's one quantized part. ValueError: other parts, format or shape than the outcome says."""
    if len(layer.parts) != 1 or not isinstance(layer.parts[0], QuantizedPart):
        raise ValueError(f"{outcome.name} is not a single quantized part")
    part = layer.parts[0]
    if part.format != outcome.codes:
        raise ValueError(f"{outcome.name} was planned as {outcome.codes} and is {part.format}")
    if tuple(part.codes.shape) != (outcome.out_features, outcome.in_features):
        raise ValueError(f"{outcome.name} has codes {tuple(part.codes.shape)}")
    return part


def dense(outcome: Outcome, layer: Layer) -> Tensor:
    """The decoded layer in the outcome's dtype, as the file holds it."""
    weight = layer.decode().to(outcome.dtype)
    return (weight.T if outcome.transposed else weight).contiguous()
