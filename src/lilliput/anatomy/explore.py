"""Find out what a model is made of: run one random-weight block of each kind and look."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.groups import channel_groups, expert_groups, head_groups
from lilliput.anatomy.links import linear_links, norm_links
from lilliput.anatomy.miniature import enlarge, miniature
from lilliput.anatomy.model import Anatomy, Block, Groups, Linear, Site
from lilliput.anatomy.probe import Probe, differs
from lilliput.anatomy.roles import flow, roles
from lilliput.anatomy.rotation import residual, turning
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import SourceError

SMALL = 4_000_000  # parameters of a block that is explored in float64
_FEW = 16  # anatomies that are kept, the latest
_STORED = ("quantization_config", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")
_KNOWN: dict[tuple[type, str], Anatomy] = {}


def explore(skeleton: Skeleton, seed: int = 0) -> Anatomy:
    """The anatomy of a skeleton's model, verified numerically with random weights; nothing of the skeleton changes.

    Blocks of one class, with equal tensor shapes and the same layer type, are one kind and share a description. A kind
    is looked at in a miniature with narrower layers where its config allows one, else at its own size; in float64, or
    in float32 where the model's code knows no float64. Raises SourceError where a block cannot be run by itself.

    A run meets equal models again, when it opens what it has written: of those the same is known already.
    """
    key = _key(skeleton, seed)
    if key not in _KNOWN:
        try:
            found = _explore(skeleton, seed, torch.float64)
        except SourceError:
            found = _explore(skeleton, seed, torch.float32)
        if len(_KNOWN) >= _FEW:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = found
    return _KNOWN[key]


def _key(skeleton: Skeleton, seed: int) -> tuple[type, str]:
    """All that an anatomy is found from: code, config and shapes, but not how weights are stored."""
    config = {name: x for name, x in skeleton.config.to_dict().items() if name not in _STORED}
    found_from = (config, list(skeleton.shapes.items()), skeleton.notes, seed)
    return type(skeleton.model), json.dumps(found_from, sort_keys=True, default=str)


def _explore(skeleton: Skeleton, seed: int, dtype: torch.dtype) -> Anatomy:
    own = _Lazy(skeleton.config, dtype)
    small = miniature(skeleton, dtype)
    kinds: dict[Any, Block] = {}
    blocks: list[Block] = []
    for i in range(len(skeleton.block_names)):
        kind = _kind(skeleton, i)
        if kind not in kinds:
            shapes = {n: skeleton.shapes[n] for n in skeleton.names_of(i)}
            block = enlarge(explore_block(small, i, seed), skeleton.block_names[i], shapes) if small else None
            kinds[kind] = block or explore_block(own.get(shapes), i, seed)
        blocks.append(kinds[kind])
    return Anatomy(
        architecture=type(skeleton.model).__name__,
        embeddings=skeleton.embeddings,
        block_names=skeleton.block_names,
        blocks=tuple(blocks),
        final=skeleton.final,
        head=skeleton.head,
        tied=skeleton.tied,
        notes=skeleton.notes,
    )


class _Lazy:
    """A skeleton of the model's own size, built once and only where it is needed."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.built: Skeleton | None = None

    def get(self, shapes: Mapping[str, Sequence[int]]) -> Skeleton:
        if self.built is None:
            large = sum(math.prod(s) for s in shapes.values()) > SMALL
            self.built = Skeleton(self.config, dtype=torch.float32 if large else self.dtype)
        return self.built


def explore_block(skeleton: Skeleton, index: int, seed: int) -> Block:
    """The anatomy of one block."""
    probe = Probe(skeleton, index, seed)
    try:
        return _look(probe)
    finally:
        probe.close()


def _look(probe: Probe) -> Block:
    notes = [f"{n}: holds weights but is neither a linear nor a norm; left unchanged" for n in probe.strange]
    notes += [f"{n}: does not run in a forward pass" for n in probe.linears if n not in probe.base.inputs]
    notes += [
        f"{n}: runs more than once" for n in sorted({n for n in probe.base.order if probe.base.order.count(n) > 1})
    ]
    sites = _stages(probe, _sites(probe))
    norms = norm_links(probe, sites)
    between = linear_links(probe, sites)
    links = (*norms.links, *between.links)
    feeds = flow(probe, sites)
    role = roles(probe, sites, links, feeds)
    channels, channel_notes = channel_groups(probe, sites, role, links)
    heads, head_notes = head_groups(probe, sites, role, feeds)
    links = turning(probe, links, heads)
    experts, expert_notes = expert_groups(probe, role)
    stream = residual(probe, links, role)
    site_of = {n: s.name for s in sites for n in s.linears}
    linears = tuple(
        Linear(n, role[n], site_of[n], f.out_features, f.in_features, f.bias, f.transposed, f.expert)
        for n, f in ((n, probe.linears[n]) for s in sites for n in s.linears)
    )
    notes += [*norms.notes, *between.notes, *channel_notes, *head_notes, *expert_notes, *stream.notes]
    return Block(
        linears=linears,
        sites=tuple(sites),
        links=links,
        groups=Groups((*heads, *experts), channels),
        notes=tuple(notes),
        residual_readers=stream.readers,
        residual_writers=stream.writers,
        chosen=probe.base.chosen,
    )


def _sites(probe: Probe) -> list[Site]:
    """Linears that read one tensor share a site, named after the first that runs."""
    by_key: dict[tuple[int, ...], list[str]] = {}
    for name in dict.fromkeys(probe.base.order):
        by_key.setdefault((*probe.base.keys[name], probe.linears[name].in_features), []).append(name)
    return [Site(names[0], probe.linears[names[0]].in_features, tuple(names), 0) for names in by_key.values()]


def _stages(probe: Probe, sites: Sequence[Site]) -> list[Site]:
    """Order sites by what they depend on: with the linears of all later stages replaced, a site's input stays."""
    placed: list[Site] = []
    remaining = list(sites)
    stage = 0
    while remaining:
        changes: dict[str, Tensor] = {}
        for site in remaining:
            for name in site.linears:
                changes |= probe.noise(name, torch.ones(probe.linears[name].out_features, dtype=torch.bool))
        run = probe.look(changes)
        base = probe.base.inputs
        free = [s for s in remaining if s.name in run.inputs and not differs(run.inputs[s.name], base[s.name])]
        if not free:
            raise RuntimeError("linears of a block depend on each other in a circle: is the block deterministic?")
        placed += [Site(s.name, s.width, s.linears, stage) for s in free]
        remaining = [s for s in remaining if s not in free]
        stage += 1
    return placed


def _kind(skeleton: Skeleton, i: int) -> Any:
    prefix = skeleton.block_names[i] + "."
    shapes = tuple((n.removeprefix(prefix), skeleton.shapes[n]) for n in skeleton.names_of(i))
    types = getattr(skeleton.config, "layer_types", None)
    return type(skeleton.block(i)), shapes, types[i] if types and i < len(types) else None
