"""Loading rehearsed before any work: the engine's own loader on the meta device, with the planned names and shapes.

Whether transformers has a place for every planned tensor depends on its loader, on its quantizers and on each model's
own code, which may read the `weight` of a linear that is packed by then, or keep experts and routers in modules that a
quantizer does not know. So none of that is modelled here: the loader runs, without a value and without memory. Blocks
of one kind load alike, so one of each kind is tried.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.wrapper import module_name, skeleton, text_prefix
from lilliput.errors import SourceError
from lilliput.export import Exporter, layouts
from lilliput.export.compressed_tensors import CompressedTensors
from lilliput.export.engine import WORD, first_line, hollow, trial
from lilliput.export.outcome import Outcome
from lilliput.formats.bits import pack_words
from lilliput.model.stored import Model
from lilliput.plan.tensors import lay_out, written_config


@dataclass(frozen=True)
class _Seen:
    """What the loader did: the error that it ended with, and the names of the module tree that it found nothing for,
    or another shape."""

    error: str | None
    missing: frozenset[str] = frozenset()


def refuse(exporter: Exporter, model: Model, outcomes: Mapping[str, Outcome]) -> str | None:
    """Why transformers would not load a folder of this layout whole; None where it would, or where trying cannot tell.

    It cannot tell where the loader does not take the model's dense tensors this way either.
    """
    entry = exporter.config(tuple(outcomes.values()), model.config)
    if entry is None:
        return None
    if exporter.name == "compressed-tensors" and (reason := _other_words(outcomes)) is not None:
        return reason
    engine = skeleton(model.config)
    name = type(engine).__name__
    native = exporter.name == "lilliput"
    if native and (reason := _swapped(engine, entry)) is not None:
        return reason
    sample = _kinds(model, outcomes)
    packed = entry if native else CompressedTensors().config(tuple(outcomes.values()), model.config)
    result = _load(engine, model, exporter, outcomes, packed, sample)
    if result.error is not None and entry != packed:  # decoded while loading, which nothing but an error calls for
        result = _load(engine, model, exporter, outcomes, entry, sample)
    if result == _Seen(None):
        return None
    dense = _load(engine, model, exporter, {}, None, sample)
    if dense.error is not None:
        return None
    nearest = "" if native else " Nearest: export 'lilliput', which it loads."
    if result.error is not None:
        return f"transformers does not load its tensors into {name} ({result.error}).{nearest}"
    missing = sorted(result.missing - dense.missing)
    if not missing:
        return None
    return (
        f"transformers finds no '{missing[0]}' for {name} in it and would continue with random numbers."
        f"{nearest or ' Nearest: leave such linears out of every step.'}"
    )


def _other_words(outcomes: Mapping[str, Outcome]) -> str | None:
    """Why the installed compressed-tensors would unpack other codes than were packed, or none at all."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.zeros(1, WORD, dtype=torch.int8)
    for x in outcomes.values():
        if x.codes is None or x.layout != layouts.PACKED:
            continue
        if pack_to_int32(codes, x.codes.bits).shape != pack_words(codes, x.codes.bits).shape:
            return (
                f"'{x.name}' has {x.codes.bits} bits, which compressed-tensors unpacks from other words before 0.19: "
                "install a later one. Nearest: 4 or 8 bits; export 'lilliput' holds it."
            )
    return None


def _swapped(engine: Any, entry: Mapping[str, Any]) -> str | None:
    """Why the engine's model lacks a linear that the native layout describes."""
    from lilliput.parts.linear import parse_config
    from lilliput.runtime.quantizer import swap

    try:
        swap(engine, parse_config(entry).values())
    except SourceError as error:
        return str(error)
    return None


def _kinds(model: Model, outcomes: Mapping[str, Outcome]) -> frozenset[int]:
    """One block of each kind: of one anatomy, whose linears become the same.

    All blocks where weights are stored as bytes: the loader would draw random values for those left out, which cannot
    be done for such on the meta device.
    """
    if any(x.layout not in (None, layouts.PACKED) for x in outcomes.values()):
        return frozenset(range(len(model.anatomy().blocks)))
    kinds: dict[Any, int] = {}
    anatomy = model.anatomy()
    for i, (name, block) in enumerate(zip(anatomy.block_names, anatomy.blocks, strict=True)):
        becomes = tuple(x.scheme for linear in block.linears if (x := outcomes.get(f"{name}.{linear.name}")))
        kinds.setdefault((id(block), becomes), i)
    return frozenset(kinds.values())


def _load(
    engine: Any,
    model: Model,
    exporter: Exporter,
    outcomes: Mapping[str, Outcome],
    entry: Mapping[str, Any] | None,
    sample: frozenset[int],
) -> _Seen:
    """Load what the exporter would write of the blocks `kept` and of all that is outside the blocks."""
    names = model.skeleton.block_names
    left_out = tuple(f"{name}." for i, name in enumerate(names) if i not in sample)
    tensors: dict[str, Tensor] = {}
    for x in lay_out(model, exporter, outcomes)[0]:
        if not x.source.startswith(left_out):
            tensors[x.name] = torch.empty(x.shape, dtype=x.dtype, device="meta")
    for outcome in outcomes.values():
        if f"{outcome.stored}.weight_shape" in tensors:  # the one tensor whose values the loader reads
            shape = torch.tensor([outcome.out_features, outcome.in_features])
            tensors[f"{outcome.stored}.weight_shape"] = shape
    source = model.config
    try:
        with trial(), tempfile.TemporaryDirectory() as folder:
            # Read from a file as the engine will: JSON has no infinities, and transformers its own way of writing them.
            Path(folder, "config.json").write_text(json.dumps(written_config(model, entry)), encoding="utf-8")
            _, info = hollow(type(engine), type(source).from_pretrained(folder), tensors)
    except Exception as error:  # whatever the engine raises is the finding
        return _Seen(first_line(error))
    modules, prefix = dict(engine.named_modules()), text_prefix(engine, source)
    prefixes = tuple(f"{module_name(names[i], modules, prefix)}." for i in sample)
    missing = {str(key) for key in (*info["missing_keys"], *info["mismatched_keys"])}
    return _Seen(None, frozenset(key for key in missing if key.startswith(prefixes)))
