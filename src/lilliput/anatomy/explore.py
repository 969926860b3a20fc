"""Find out what a model is made of: run one random-weight block of each kind and look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.groups import channel_groups, expert_groups, head_groups
from lilliput.anatomy.links import linear_links, norm_links
from lilliput.anatomy.model import Anatomy, Block, Linear, Site
from lilliput.anatomy.probe import Probe, differs
from lilliput.anatomy.roles import flow, roles
from lilliput.anatomy.rotation import residual
from lilliput.anatomy.skeleton import Skeleton

SMALL = 4_000_000  # parameters of a block that is explored in float64


def explore(skeleton: Skeleton, seed: int = 0) -> Anatomy:
    """The anatomy of a skeleton's model, verified numerically with random weights; nothing of the skeleton changes.

    Blocks of one class, with equal tensor shapes and the same layer type, are one kind and share a description.
    Raises SourceError where a block cannot be run by itself.
    """
    sizes = [sum(_numel(skeleton.shapes[n]) for n in skeleton.names_of(i)) for i in range(len(skeleton.block_names))]
    dtype = torch.float64 if max(sizes) <= SMALL else torch.float32
    own = Skeleton(skeleton.config, dtype=dtype)
    kinds: dict[Any, Block] = {}
    blocks: list[Block] = []
    for i in range(len(own.block_names)):
        kind = _kind(own, i)
        if kind not in kinds:
            kinds[kind] = explore_block(own, i, seed)
        blocks.append(kinds[kind])
    return Anatomy(
        architecture=type(own.model).__name__,
        embeddings=own.embeddings,
        block_names=own.block_names,
        blocks=tuple(blocks),
        final=own.final,
        head=own.head,
        tied=own.tied,
        notes=own.notes,
    )


def explore_block(skeleton: Skeleton, index: int, seed: int) -> Block:
    """The anatomy of one block."""
    probe = Probe(skeleton, index, seed)
    try:
        return _look(probe)
    finally:
        probe.close()


def _look(probe: Probe) -> Block:
    notes = [f"{n}: holds weights but is neither a linear nor a norm; left as it is" for n in probe.strange]
    notes += [f"{n}: does not run in a forward pass" for n in probe.linears if n not in probe.base.inputs]
    notes += [
        f"{n}: runs more than once" for n in sorted({n for n in probe.base.order if probe.base.order.count(n) > 1})
    ]
    sites = _stages(probe, _sites(probe))
    norms = norm_links(probe, sites)
    between = linear_links(probe, sites)
    links = (*norms.links, *between.links)
    found = flow(probe, sites)
    role = roles(probe, sites, links, found)
    groups = [
        channel_groups(probe, sites, role, links),
        head_groups(probe, sites, role, found),
        expert_groups(probe, role),
    ]
    stream = residual(probe, links, role)
    site_of = {n: s.name for s in sites for n in s.linears}
    linears = tuple(
        Linear(n, role[n], site_of[n], f.out_features, f.in_features, f.bias, f.transposed, f.expert)
        for n, f in ((n, probe.linears[n]) for s in sites for n in s.linears)
    )
    notes += [*norms.notes, *between.notes, *(x for g in groups for x in g.notes), *stream.notes]
    return Block(
        linears=linears,
        sites=tuple(sites),
        links=links,
        groups=tuple(x for g in groups for x in g.groups),
        notes=tuple(notes),
        residual_readers=stream.readers,
        residual_writers=stream.writers,
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
    left = list(sites)
    stage = 0
    while left:
        changes: dict[str, Tensor] = {}
        for site in left:
            for name in site.linears:
                changes |= probe.noise(name, torch.ones(probe.linears[name].out_features, dtype=torch.bool))
        seen = probe.look(changes)
        base = probe.base.inputs
        free = [s for s in left if s.name in seen.inputs and not differs(seen.inputs[s.name], base[s.name])]
        if not free:
            raise RuntimeError("linears of a block depend on each other in a circle: is the block deterministic?")
        placed += [Site(s.name, s.width, s.linears, stage) for s in free]
        left = [s for s in left if s not in free]
        stage += 1
    return placed


def _kind(skeleton: Skeleton, i: int) -> Any:
    prefix = skeleton.block_names[i] + "."
    shapes = tuple((n.removeprefix(prefix), skeleton.shapes[n]) for n in skeleton.names_of(i))
    types = getattr(skeleton.config, "layer_types", None)
    return type(skeleton.block(i)), shapes, types[i] if types and i < len(types) else None


def _numel(shape: Sequence[int]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out
