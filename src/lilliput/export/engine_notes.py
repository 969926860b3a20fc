"""What engines make of a folder of compressed-tensors, in sentences for the plan: measured, see docs/engines.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lilliput.export.layouts import PAIRS
from lilliput.export.outcome import Outcome
from lilliput.export.settings import Setting, setting_of


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
