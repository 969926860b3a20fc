"""Who reads and who writes the residual stream: what an orthogonal change of its basis needs, proved by doing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.anatomy.links import TOLERANCE
from lilliput.anatomy.model import Link, Role
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
