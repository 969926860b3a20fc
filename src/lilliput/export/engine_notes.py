"""What engines make of a folder of compressed-tensors, in sentences for the plan: measured, see docs/engines.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lilliput.export.layouts import FLOAT, NVFP4, PACKED, PAIRS
from lilliput.export.outcome import Outcome
from lilliput.export.settings import Setting, setting_of
from lilliput.formats.integer import IntegerFormat
from lilliput.parts.inputs.minifloat import FloatInput

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that vLLM runs as one


def of(quantized: Sequence[Outcome], decoded: bool) -> list[str]:
    """Where transformers decodes in another dtype than the model's, and who does not run it."""
    formats = [x.codes for x in quantized if x.codes is not None]
    eager = decoded or any(not f.symmetric for f in formats) or any(x.expert for x in quantized)
    notes = []
    if eager and any(x.scale_dtype not in (None, torch.float32) for x in quantized):
        which = "the linears" if decoded else "zero points and experts"
        notes.append(
            f"transformers decodes {which} in the dtype of the scales: loaded in a wider dtype, "
            "each weight is rounded once to that dtype."
        )
    if any(x.layout in PAIRS for x in quantized):
        notes.append(
            "transformers decodes nvfp4 and mxfp4 in bfloat16: loaded in another dtype, each weight is rounded once to "
            "it."
        )
    split = _split_siblings(quantized)
    if split is not None:
        notes.append(f"vLLM runs the linears of {split} as one and needs one setting for them: it refuses this file.")
    if not {x.bits for x in formats if isinstance(x, IntegerFormat)} <= {4, 8}:
        notes.append("SGLang reads only 4 and 8 bits; vLLM reads 2 to 8 symmetric, and 4 and 8 asymmetric.")
    notes += [*_on_a_cpu(quantized), *_shared_scales(quantized)]
    if any(x.table for x in quantized):
        notes.append("vLLM has no place for a packed head, and refuses this file; it serves export 'lilliput'.")
    return notes


def _on_a_cpu(quantized: Sequence[Outcome]) -> list[str]:
    """Which linears vLLM has no kernel for on a CPU, and whether it rounds the inputs of the others."""
    kinds = {x.scheme.describe(): _runs(x) for x in quantized}
    refused = [kind for kind, runs in kinds.items() if not runs]
    if refused:
        return [
            f"vLLM on a CPU refuses this file for its {refused[0]}: it has kernels there for 4-bit integers, int8 "
            "weights by row with int8 inputs, and fp8 weights with fp8 inputs by token."
        ]
    rounded = [x for x in quantized if x.scheme.activation is not None]
    kept = [x.scheme.describe() for x in rounded if x.layout == PACKED]
    if kept:
        return [f"vLLM on a CPU runs the {kept[0]} of this file with inputs as they are: nothing is rounded there."]
    return ["vLLM on a CPU rounds inputs as this plan does, and multiplies 8-bit numbers."] if rounded else []


def _runs(x: Outcome) -> bool:
    """Whether vLLM runs such a linear on a CPU: docs/engines.md."""
    form, inputs = x.codes, x.scheme.activation
    if isinstance(form, IntegerFormat):
        return form.bits == 4 if inputs is None or form.bits < 8 else form.group_size <= 0
    return isinstance(inputs, FloatInput) and x.layout == FLOAT and inputs.dynamic


def _shared_scales(quantized: Sequence[Outcome]) -> list[str]:
    """nvfp4 linears that vLLM runs as one, of whose global scales it takes one for all, where they do not share one."""
    for names in _TOGETHER:
        stacks: dict[str, str] = {}
        for x in quantized:
            parent, _, leaf = x.name.rpartition(".")
            if x.layout != NVFP4 or leaf not in names:
                continue
            own = x.stack or x.name
            if stacks.setdefault(parent, own) != own:
                return [
                    f"vLLM takes one global scale of nvfp4 for {', '.join(names)}, the largest of theirs, which "
                    "changes the weights of the others. Let the same steps compress them (rtn, gptq), or take "
                    "fp8 for vLLM."
                ]
    return []


def _split_siblings(quantized: Sequence[Outcome]) -> str | None:
    """The first set of linears that vLLM fuses (q/k/v, gate/up) and that differ in bits, symmetry or group, in
    words."""
    for names in _TOGETHER:
        kinds: dict[str, Setting | None] = {}
        for x in quantized:
            parent, _, leaf = x.name.rpartition(".")
            if leaf in names and kinds.setdefault(parent, setting_of(x)) != setting_of(x):
                return f"{parent} ({', '.join(names)})"
    return None
