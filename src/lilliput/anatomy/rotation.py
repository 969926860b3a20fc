"""Who reads and who writes the residual stream, and which heads may be turned: what an orthogonal change of basis
needs, proved by doing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.algebra.rotations import turned
from lilliput.anatomy.links import TOLERANCE
from lilliput.anatomy.model import Group, Link, Role
from lilliput.anatomy.probe import Probe


@dataclass(frozen=True)
class Residual:
    readers: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    notes: tuple[str, ...]


def residual(probe: Probe, links: Sequence[Link], roles: Mapping[str, Role]) -> Residual:
    """Readers (through which norm) and writers of the residual stream, or none and the reason.

    Gains go into the readers, which are then multiplied by a random rotation R, writers by its transpose: the block
    must turn h R into (its output for h) R.
    """
    width = probe.hidden.shape[-1]
    norms = [x for x in links if x.kind == "norm" and len(x.index) == width and x.producer not in _behind_linear(probe)]
    writers = tuple(n for n in probe.linears if roles[n] in ("o", "down") and probe.linears[n].out_features == width)
    if not norms or not writers:
        return Residual((), (), ("no norm-to-linear links from the residual stream: it cannot be rotated",))
    rotation = torch.linalg.qr(torch.randn(width, width, generator=probe.rng, dtype=torch.float64))[0]
    rotation = rotation.to(probe.skeleton.dtype)
    changes: dict[str, Tensor] = {}
    for link in norms:
        gain = link.offset + probe.tensor(f"{link.producer}.weight")
        changes[f"{link.producer}.weight"] = torch.ones_like(gain) - link.offset
        for reader in link.readers:
            weight = probe.columns(reader, gain)[f"{reader}.weight"]
            transposed = probe.linears[reader].transposed
            changes[f"{reader}.weight"] = rotation.T @ weight if transposed else weight @ rotation
    for writer in writers:
        weight = probe.tensor(f"{writer}.weight")
        changes[f"{writer}.weight"] = weight @ rotation if probe.linears[writer].transposed else rotation.T @ weight
        if probe.linears[writer].bias:
            changes[f"{writer}.bias"] = probe.tensor(f"{writer}.bias") @ rotation
    run = probe.look(changes, hidden=probe.hidden @ rotation)
    expected = probe.base.out @ rotation
    error = float((run.out - expected).norm() / (expected - probe.hidden @ rotation).norm())
    if not error <= TOLERANCE:
        return Residual((), (), (f"the residual stream cannot be rotated: the block's output changes by {error:.1e}",))
    return Residual(tuple((x.producer, x.readers) for x in norms), writers, ())


def turning(probe: Probe, links: Sequence[Link], groups: Sequence[Group]) -> tuple[Link, ...]:
    """The links, with the size of heads where each head of the producer can be turned and turned back in the readers:
    a gate on single channels between the two lets scales through, and no rotation."""
    return tuple(_turning(probe, link, groups) if link.kind == "linear" else link for link in links)


def _turning(probe: Probe, link: Link, groups: Sequence[Group]) -> Link:
    columns = [
        torch.cat([torch.arange(*span) for name, axis, span in group.members if (name, axis) == (reader, "columns")])
        for group in groups
        for reader in link.readers[:1]
        if group.kind == "head" and any((name, axis) == (reader, "columns") for name, axis, _ in group.members)
    ]
    sizes = {len(set(link.index[x].tolist())) for x in columns}
    if len(sizes) != 1 or (size := sizes.pop()) < 2 or len(link.index) % size:
        return link
    whole = replace(link, head=size)
    rows, which = whole.heads()
    if len(set(rows.flatten().tolist())) != rows.numel():
        return link
    matrices = torch.linalg.qr(torch.randn(len(rows), size, size, generator=probe.rng, dtype=torch.float64))[0]
    changes: dict[str, Tensor] = {}
    for name in (f"{link.producer}.{suffix}" for suffix in ("weight", "bias")):
        if probe.has(name):
            changes[name] = _turned(probe, link.producer, name, rows, matrices, 0)
    stretches = torch.arange(len(link.index)).view(-1, size)
    for reader in link.readers:
        name = f"{reader}.weight"
        changes[name] = _turned(probe, reader, name, stretches, matrices[which], 1)
    return whole if probe.error(probe.look(changes)) <= TOLERANCE else link


def _turned(probe: Probe, linear: str, name: str, places: Tensor, matrices: Tensor, axis: int) -> Tensor:
    value = probe.tensor(name)
    flipped = probe.linears[linear].transposed and value.dim() == 2
    return turned(value, places, matrices, 1 - axis if flipped else axis).contiguous()


def _behind_linear(probe: Probe) -> set[str]:
    """Norms whose input is (the first columns of) a linear's output, as between the two halves of a low-rank linear."""
    norms: set[str] = set()
    for norm, (x, _) in probe.base.norms.items():
        rows = x.reshape(-1, x.shape[-1])
        for y in probe.base.outputs.values():
            flat = y.reshape(-1, y.shape[-1])
            if (
                len(flat) == len(rows)
                and flat.shape[1] >= rows.shape[1]
                and torch.equal(flat[:, : rows.shape[1]], rows)
            ):
                norms.add(norm)
    return norms
