"""Who absorbs whose scale: candidates found by looking at values, reported only where the block's output stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.anatomy.model import Link, Site
from lilliput.anatomy.probe import Probe

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Links:
    """Verified links, and notes on those that were not."""

    links: tuple[Link, ...]
    notes: tuple[str, ...]


def norm_links(probe: Probe, sites: Sequence[Site]) -> Links:
    """Links from norms to the linears that read rows of their output."""
    links: list[Link] = []
    notes: list[str] = []
    site_of = {n: s.name for s in sites for n in s.linears}
    for norm in probe.norms:
        if norm not in probe.base.norms:
            continue
        output = probe.base.norms[norm][1]
        readers = tuple(n for n in site_of if _reads(probe.base.inputs[n], output))
        if not readers:
            continue
        width = output.shape[-1]
        errors = {offset: _try_norm(probe, norm, readers, width, offset) for offset in (0.0, 1.0)}
        offset = min(errors, key=lambda x: errors[x])
        if errors[offset] <= TOLERANCE:
            first = site_of[readers[0]]
            shifts = probe.has(f"{norm}.bias") and all(probe.linears[n].bias for n in readers)
            links.append(Link("norm", norm, readers, first, torch.arange(width), offset, errors[offset], shifts=shifts))
        else:
            notes.append(f"{norm}: its output is used by more than {_some(readers)}, so no scale can move into it")
    order = {s.name: i for i, s in enumerate(sites)}
    return Links(tuple(sorted(links, key=lambda x: order[x.site])), tuple(notes))


def linear_links(probe: Probe, sites: Sequence[Site]) -> Links:
    """Links from linears to linears, such as v to o and up to down."""
    links: list[Link] = []
    notes: list[str] = []
    stage = {n: s.stage for s in sites for n in s.linears}
    for family in _families(probe, stage):
        producers = [n for n in family if not probe.linears[n].router]
        if not producers:
            continue
        later = [s for s in sites if s.stage > stage[producers[0]]]
        candidates = _candidates(probe, producers, later)
        together = (
            _try_linear(probe, candidates)
            if len(candidates) > 1 and len(candidates) == len(producers)
            else float("inf")
        )
        for one in candidates:  # experts at once, and one by one only where that fails
            producer, site, index = one
            error = together if together <= TOLERANCE else _try_linear(probe, [one])
            if error <= TOLERANCE:
                links.append(Link("linear", producer, site.linears, site.name, index, 0.0, error))
            else:
                notes.append(
                    f"{producer} -> {_some(site.linears)}: channels correspond, but a scale changes the block's output "
                    f"by {error:.1e}"
                )
    order = {s.name: i for i, s in enumerate(sites)}
    return Links(tuple(sorted(links, key=lambda x: order[x.site])), tuple(notes))


def channel_rows(probe: Probe, producer: str, consumer: str, without: Tensor | None = None) -> Tensor | None:
    """The one row of `producer` that each input channel of `consumer` depends on (at the first token), int64 [width].

    Rows in `without` (bool [out]) are left alone. None where a channel depends on no row or on several. Rows are told
    apart by the bits of their numbers: each run replaces the rows in which one bit is set, or not set.
    """
    rows = probe.linears[producer].out_features
    numbers = torch.arange(rows)
    index = torch.zeros(probe.linears[consumer].in_features, dtype=torch.int64)
    base = probe.early(probe.base.inputs[consumer])
    for bit in range(max(1, (rows - 1).bit_length())):
        marked = (numbers >> bit) & 1 == 1
        hits = []
        for mask in (marked, ~marked):
            run = probe.look(probe.noise(producer, mask if without is None else mask & ~without))
            if consumer not in run.inputs or run.inputs[consumer].shape != probe.base.inputs[consumer].shape:
                return None
            hits.append((probe.early(run.inputs[consumer]) - base).abs().amax(0) > 1e-6 * base.abs().max())
        if not bool((hits[0] ^ hits[1]).all()):
            return None
        index |= hits[0].long() << bit
    return index


def _families(probe: Probe, stage: Mapping[str, int]) -> list[list[str]]:
    """Linears that may be changed together: the experts' linears of one name, every other by itself."""
    families: dict[str, list[str]] = {}
    for name in stage:
        families.setdefault(probe.linears[name].family, []).append(name)
    return list(families.values())


def _reads(x: Tensor, output: Tensor) -> bool:
    """Whether every row of x is a row of the norm's output."""
    width = output.shape[-1]
    if x.shape[-1] != width:
        return False
    x, y = x.reshape(-1, width), output.reshape(-1, width)
    if x.shape == y.shape:
        return torch.equal(x, y)
    order = y[:, 0].argsort()
    place = torch.searchsorted(y[order, 0].contiguous(), x[:, 0].contiguous()).clamp_max(len(y) - 1)
    return torch.equal(y[order[place]], x)


def _try_norm(probe: Probe, norm: str, readers: Sequence[str], width: int, offset: float) -> float:
    scale = probe.uniform(width)
    weight = probe.tensor(f"{norm}.weight")
    changes = {f"{norm}.weight": (offset + weight) / scale - offset}
    if probe.has(f"{norm}.bias"):
        changes[f"{norm}.bias"] = probe.tensor(f"{norm}.bias") / scale
    for reader in readers:
        changes |= probe.columns(reader, scale)
    return probe.error(probe.look(changes))


def _try_linear(probe: Probe, candidates: Sequence[tuple[str, Site, Tensor]]) -> float:
    changes: dict[str, Tensor] = {}
    for producer, site, index in candidates:
        rows = torch.ones(probe.linears[producer].out_features, dtype=probe.skeleton.dtype)
        scale = probe.uniform(len(rows))
        used = torch.zeros(len(rows), dtype=torch.bool)
        used[index] = True
        changes |= probe.rows(producer, torch.where(used, 1 / scale, rows))
        for reader in site.linears:
            changes |= probe.columns(reader, scale[index])
    return probe.error(probe.look(changes))


def _candidates(probe: Probe, family: Sequence[str], later: Sequence[Site]) -> list[tuple[str, Site, Tensor]]:
    """(producer, site, index) where each channel of the site is proportional to one row of the producer.

    Rows are multiplied by factors that are all different; the factor that comes out at a channel names its row. Where
    a channel also depends on other rows of the same linear (gate and up in one), only some rows at a time are changed.
    """
    open_: list[tuple[str, Site, Tensor]] = []
    for producer in family:
        mine = probe.linears[producer]
        for site in later:
            first = probe.linears[site.linears[0]]
            if first.expert == mine.expert and site.linears[0] in probe.base.inputs:
                open_.append((producer, site, torch.full((site.width,), -1, dtype=torch.int64)))
    rows = probe.linears[family[0]].out_features
    factor = probe.uniform(rows)
    numbers = torch.arange(rows)
    masks = [torch.ones(rows, dtype=torch.bool)]
    for bit in range(max(1, (rows - 1).bit_length())):
        marked = (numbers >> bit) & 1 == 1
        masks += [marked, ~marked]
    for mask in masks:
        # a site that no row of the producer reaches is proportional to none of them
        some = [x for x in open_ if mask is masks[0] or bool((x[2] < 0).any())]
        if not some:
            break
        changes: dict[str, Tensor] = {}
        used = torch.where(mask, factor, torch.ones_like(factor))
        for producer in family:
            changes |= probe.rows(producer, used)
        run = probe.look(changes)
        reached = []
        for producer, site, index in some:
            before, after = probe.base.inputs[site.linears[0]], run.inputs.get(site.linears[0])
            if after is None or after.shape != before.shape:
                continue
            x, y = probe.early(before), probe.early(after)
            if mask is masks[0] and not bool(((y - x).abs().amax(0) > 1e-4 * x.abs().max()).all()):
                continue
            reached.append((producer, site, index))
            index[:] = torch.where(index < 0, _match(x, y, factor, mask), index)
        if mask is masks[0]:
            open_ = reached
    return [x for x in open_ if bool((x[2] >= 0).all())]


def _match(x: Tensor, y: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
    """For each channel the row in mask whose factor turns x [n, width] into y [n, width], or -1."""
    ratio = (x * y).sum(0) / (x * x).sum(0).clamp_min(torch.finfo(x.dtype).tiny)
    fits = (y - x * ratio).norm(dim=0) <= 1e-5 * y.norm(dim=0)
    where = mask.nonzero().flatten()
    order = where[factor[where].argsort()]
    values = factor[order].contiguous()
    right = torch.searchsorted(values, ratio.contiguous()).clamp(0, len(values) - 1)
    lower = (right - 1).clamp_min(0)
    nearest = torch.where((values[lower] - ratio).abs() < (values[right] - ratio).abs(), lower, right)
    step = 1.039 / len(factor)  # the factors' distance, relative
    close = (values[nearest] / ratio - 1).abs() <= min(0.1 * step, 1e-3)
    alive = x.norm(dim=0) > 0
    return torch.where(fits & close & alive, order[nearest], torch.full_like(nearest, -1))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
