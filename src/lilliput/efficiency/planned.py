"""The predicted time of a decoding step of a model that is only planned: how its linears will be held is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lilliput.efficiency.devices import Device
from lilliput.efficiency.roofline import operators, workload
from lilliput.efficiency.serving import Serving, dense, native
from lilliput.export.outcome import Outcome
from lilliput.model.stored import Model
from lilliput.parts.linear import LinearSpec

CONTEXT = 512  # tokens that the step attends to


def decode_seconds(model: Model, device: Device, linears: Iterable[tuple[Outcome, int]], fused: bool) -> float:
    """Seconds of a step of one sequence that attends to `CONTEXT` tokens, or to all that the model knows.

    linears: what each compressed linear becomes, with its bytes; `fused`: the engine multiplies them without decoding
    them first, as for every layout but Lilliput's own. Everything else is as the original has it. Raises PlanError for
    a model whose config does not tell its shapes.
    """
    work = workload(model, device)
    served: dict[str, Serving] = {}
    for outcome, size in linears:
        bits = 8 * size / (outcome.out_features * outcome.in_features)
        plain = replace(dense(work.dtype), label=f"{int(bits)}-bit weights", bits=bits)
        spec = LinearSpec(
            outcome.name, outcome.stored, outcome.out_features, outcome.in_features, outcome.scheme
        )  # fmt: skip
        decoded = native(spec, bits, work.dtype, thin=False, few=False, apart=False)
        served[f"{outcome.name}.weight"] = plain if fused else decoded
    known = {x.tensor for x in work.shapes.matrices}
    work = replace(work, served={**work.served, **{k: v for k, v in served.items() if k in known}})
    context = min(CONTEXT, work.shapes.positions or CONTEXT)
    return sum(x.seconds for x in operators(work, device, "decode", 1, context))
