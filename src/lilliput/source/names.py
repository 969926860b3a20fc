"""Which stored tensor is which tensor of the module tree: renames, merged experts, prefixes of wrappers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

EXPERTS = re.compile(r"^(.*\.experts)\.(gate_up_proj|gate_proj|up_proj|down_proj)$")


@dataclass(frozen=True)
class Ref:
    """Where a canonical tensor lies: a stored tensor, or a part of it.

    index: entry along the first axis of a stored 3-D tensor, taken first; rows: [start, stop) of what is left;
    transposed: the stored matrix (after index and rows) has its axes swapped.
    """

    stored: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part, given that of the stored tensor."""
        shape = stored if self.index is None else stored[1:]
        if self.rows is not None:
            shape = (self.rows[1] - self.rows[0], *shape[1:])
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Names:
    """refs: canonical name -> place; prefix: what stored names have where canonical ones have the base model's name;
    strange: stored name -> the conversion that it would need and that is not known here."""

    refs: Mapping[str, Ref]
    prefix: str
    strange: Mapping[str, str]


def bind(stored: Mapping[str, tuple[int, ...]], canonical: Iterable[str], module: nn.Module) -> Names:
    """Places of the `wanted` canonical names among stored names and shapes; what is not found is left out.

    `module` is the transformers model on the meta device: it knows which renames its checkpoints need.
    """
    places, strange = _renamed(stored, module)
    base = str(getattr(module, "base_model_prefix", ""))
    base = f"{base}." if base else ""
    names = list(canonical)
    inner = [x.removeprefix(base) for x in names if x.startswith(base)]
    prefix = _prefix(places, inner, base)
    refs: dict[str, Ref] = {}
    for name in names:
        if name.startswith(base) and base:
            ref = places.get(prefix + name.removeprefix(base))
        else:
            ref = places.get(name) or places.get(_closest(places, name, prefix))
        if ref is not None:
            refs[name] = ref
        elif name in stored:
            refs[name] = Ref(name)
    return Names(refs, prefix, strange)


def single_name(canonical: str, module: nn.Module) -> str | None:
    """A name under which transformers loads this expert's tensor by itself; None where it only takes them fused."""
    match = re.match(r"^(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$", canonical)
    if match is None:
        return None
    base, expert, leaf = match.groups()
    fused = f"{base}.{'down_proj' if leaf == 'down' else 'gate_up_proj'}"
    for converter in get_model_conversion_mapping(module):
        if not isinstance(converter, WeightConverter) or type(converter.operations[0]) is not MergeModulelist:
            continue
        (target, *more), sources = converter.target_patterns, converter.source_patterns
        if not more and fused.endswith(target) and len(sources) == (1 if leaf == "down" else 2):
            return fused.removesuffix(target) + str(sources[leaf == "up"].replace("*", expert))
    return None


def _renamed(stored: Mapping[str, tuple[int, ...]], module: nn.Module) -> tuple[dict[str, Ref], dict[str, str]]:
    """Names that transformers would give the stored tensors, experts one by one."""
    mapping = get_model_conversion_mapping(module)
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    places: dict[str, Ref] = {}
    strange: dict[str, str] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is None:
            places[target] = Ref(name)
            places.update(_fused(target, name, stored[name]))
            continue
        converter = next(x for x in converters if pattern in x.source_patterns)
        parts = _converted(rename_source_key(name, renamings, [])[0], name, target, pattern, converter, stored[name])
        if not parts:
            strange[name] = " + ".join(type(x).__name__ for x in converter.operations)
        places.update(parts)
    return places, strange


def _fused(target: str, name: str, shape: tuple[int, ...]) -> dict[str, Ref]:
    """The experts in a stored 3-D tensor, as [experts, out, in]; gate and up one above the other."""
    match = EXPERTS.match(target)
    if match is None or len(shape) != 3:
        return {}
    base, leaf = match.groups()
    out: dict[str, Ref] = {}
    for e in range(shape[0]):
        if leaf == "gate_up_proj":
            half = shape[1] // 2
            out[f"{base}.{e}.gate_proj.weight"] = Ref(name, e, (0, half))
            out[f"{base}.{e}.up_proj.weight"] = Ref(name, e, (half, 2 * half))
        else:
            out[f"{base}.{e}.{leaf}.weight"] = Ref(name, e)
    return out


def _converted(
    renamed: str, name: str, target: str, pattern: str, converter: WeightConverter, shape: tuple[int, ...]
) -> dict[str, Ref]:
    """Canonical parts of a stored tensor that a converter takes; empty when its operations are not known here."""
    kinds = [type(x) for x in converter.operations]
    if kinds in ([MergeModulelist], [MergeModulelist, Concatenate]):
        match = EXPERTS.match(target)
        number = re.search(pattern.replace("*.", r"(\d+)\."), renamed)
        if match is None or number is None or number.re.groups != 1:
            return {}
        base, leaf = match.groups()
        if leaf == "gate_up_proj":
            leaf = ("gate_proj", "up_proj")[converter.source_patterns.index(pattern)]
        return {f"{base}.{int(number.group(1))}.{leaf}.weight": Ref(name)}
    if kinds == [Chunk] and converter.operations[0].dim == 0 and shape[0] % len(converter.target_patterns) == 0:
        first, step = converter.target_patterns[0], shape[0] // len(converter.target_patterns)
        parts = [target.replace(first, x, 1) for x in converter.target_patterns]
        return {part: Ref(name, rows=(i * step, (i + 1) * step)) for i, part in enumerate(parts)}
    if kinds == [Transpose] and len(shape) == 2 and not converter.operations[0].check_dims:
        return {target: Ref(name, transposed=True)}
    return {}


def _prefix(places: Mapping[str, Ref], inner: list[str], base: str) -> str:
    """What stands before the language model's own names in the files: covers most of them, shortest first."""
    votes: Counter[str] = Counter()
    for tail in {*inner[:: max(1, len(inner) // 8)], *inner[:1]}:
        for place in places:
            if place.endswith(tail) and (place == tail or place[-len(tail) - 1] == "."):
                votes[place[: -len(tail)]] += 1
    if not votes:
        return base
    return max(votes, key=lambda p: (sum(p + x in places for x in inner), p == base, -len(p)))


def _closest(places: Mapping[str, Ref], name: str, prefix: str) -> str:
    """The stored name that ends in `name` and shares most with the language model's prefix; "" if there is none."""
    ends = [x for x in places if x.endswith(f".{name}")]
    return max(ends, key=lambda x: (len(_common(x, prefix)), -len(x)), default="")


def _common(a: str, b: str) -> str:
    parts = zip(a.split("."), b.split("."), strict=False)
    shared = []
    for x, y in parts:
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)
