"""What can leave together: hidden channels, heads with their query group, experts; found by changing rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lilliput.anatomy.links import channel_rows
from lilliput.anatomy.model import Channels, Group, Link, Role, Site
from lilliput.anatomy.probe import Probe, changed_channels
from lilliput.anatomy.roles import Flow
from lilliput.anatomy.setting import setting

Member = tuple[str, Literal["rows", "columns"], tuple[int, int]]


def channel_groups(
    probe: Probe, sites: Sequence[Site], roles: Mapping[str, Role], links: Sequence[Link]
) -> tuple[list[Channels], list[str]]:
    """The hidden channels of every MLP: their rows in gate and up, their columns in down; and notes."""
    out: list[Channels] = []
    notes: list[str] = []
    linked = {(x.producer, x.site): x.index for x in links if x.kind == "linear"}
    maps: dict[tuple[str, ...], list[Tensor] | None] = {}
    for site in sites:
        if not all(roles[n] == "down" for n in site.linears):
            continue
        feeders = _feeders(probe, site, roles)
        family = tuple(probe.linears[n].family for n in (*feeders, site.name))
        if family not in maps:  # experts are alike: the first stands for all
            maps[family] = _maps(probe, site.name, feeders, linked)
        index = maps[family]
        if index is None:
            notes.append(f"{site.name}: no single row of {', '.join(feeders)} makes up each of its channels")
            continue
        names = [n for n in feeders for _ in range(2 if roles[n] == "gate_up" else 1)]
        out.append(Channels(tuple(zip(names, index, strict=True)), site.linears, site.width))
    return out, notes


def head_groups(
    probe: Probe, sites: Sequence[Site], roles: Mapping[str, Role], feeds: Flow
) -> tuple[list[Group], list[str]]:
    """One group per key-value head: its rows in q, k and v, the columns of its queries in o.

    Rows are taken in chunks of a head's size; a chunk belongs to the heads whose channels change with it.
    """
    groups: list[Group] = []
    notes: list[str] = []
    for site in sites:
        if not all(roles[n] == "o" for n in site.linears):
            continue
        feeders = [n for n in probe.linears if site.name in feeds.direct.get(n, ())]
        chunks = _chunks(probe, site, feeders)
        parts = _components(site, chunks) if chunks is not None else None
        if parts is None:
            notes.append(f"{site.name}: its heads could not be told apart")
        else:
            groups += [_head(site, members, columns) for members, columns in parts]
    return groups, notes


def expert_groups(probe: Probe, roles: Mapping[str, Role]) -> tuple[list[Group], list[str]]:
    """One group per expert: all its linears, and its row in the router."""
    groups: list[Group] = []
    notes: list[str] = []
    for router in [n for n, r in roles.items() if r == "router" and probe.linears[n].router]:
        parent = router.rpartition(".")[0]
        own = {n: f for n, f in probe.linears.items() if f.expert is not None and n.startswith(f"{parent}.")}
        experts = sorted({f.expert for f in own.values() if f.expert is not None})
        if not _routed_by_row(probe, router, own, experts):
            notes.append(f"{router}: its rows could not be matched with the experts")
            continue
        for e in experts:
            members: list[Member] = [(router, "rows", (e, e + 1))]
            for name, linears in own.items():
                if linears.expert == e:
                    down = roles[name] == "down"
                    members.append(
                        (
                            name,
                            "columns" if down else "rows",
                            (0, linears.in_features if down else linears.out_features),
                        )
                    )
            groups.append(Group("expert", tuple(members)))
    return groups, notes


def _feeders(probe: Probe, site: Site, roles: Mapping[str, Role]) -> list[str]:
    parent = site.name.rpartition(".")[0]
    return [n for n in probe.linears if roles[n] in ("gate", "up", "gate_up") and n.rpartition(".")[0] == parent]


def _maps(
    probe: Probe, consumer: str, feeders: Sequence[str], linked: Mapping[tuple[str, str], Tensor]
) -> list[Tensor] | None:
    """For each feeder (twice for gate and up in one) the row that belongs to each channel."""
    out: list[Tensor] = []
    for name in feeders:
        rows = probe.linears[name].out_features
        up = linked.get((name, consumer))
        if rows >= 2 * probe.linears[consumer].in_features:
            if up is None:
                return None
            used = torch.zeros(rows, dtype=torch.bool)
            used[up] = True
            gate = channel_rows(probe, name, consumer, without=used)
            if gate is None:
                return None
            out += [gate, up]
        else:
            index = channel_rows(probe, name, consumer)
            if index is None:
                return None
            out.append(index)
    return out or None


def _heads(probe: Probe) -> tuple[int, int]:
    config: Any = probe.skeleton.config
    heads = int(setting(config, "num_attention_heads", probe.index) or 0)
    return heads, int(setting(config, "num_key_value_heads", probe.index) or heads)


def _chunks(probe: Probe, site: Site, feeders: Sequence[str]) -> list[tuple[str, tuple[int, int], Tensor]] | None:
    """(linear, rows, channels of the site that change with them) for rows in steps of a head's size."""
    heads, pairs = _heads(probe)
    if heads == 0 or site.width % heads:
        return None
    out: list[tuple[str, tuple[int, int], Tensor]] = []
    queries = sum(1 for n in feeders if probe.linears[n].out_features % heads == 0)
    if queries == 0:
        return None
    base = probe.base.inputs[site.name]
    for name in feeders:
        rows = probe.linears[name].out_features
        size = _chunk_size(probe, name, feeders, site.width // heads, heads, pairs)
        if size == 0 or rows % size:
            return None
        for start in range(0, rows, size):
            mask = torch.zeros(rows, dtype=torch.bool)
            mask[start : start + size] = True
            run = probe.look(probe.noise(name, mask))
            hit = changed_channels(run.inputs[site.name], base)
            if bool(hit.any()):
                out.append((name, (start, start + size), hit))
    return out


def _chunk_size(probe: Probe, name: str, feeders: Sequence[str], width: int, heads: int, pairs: int) -> int:
    """Rows of one head: all q rows over the heads, all k or v rows over the key-value heads, else a head's width."""
    rows = probe.linears[name].out_features
    if len(feeders) == 1:
        return width
    if rows % width == 0 and rows // width in (heads, pairs, 1):
        return width
    return rows // heads if rows % heads == 0 else (rows // pairs if rows % pairs == 0 else 0)


def _components(
    site: Site, chunks: Sequence[tuple[str, tuple[int, int], Tensor]]
) -> list[tuple[list[Member], Tensor]] | None:
    """Chunks whose channels overlap are one group."""
    parts: list[tuple[list[Member], Tensor]] = []
    for name, rows, hit in chunks:
        members: list[Member] = [(name, "rows", rows)]
        touching = [p for p in parts if bool((p[1] & hit).any())]
        for p in touching:
            members = p[0] + members
            hit = hit | p[1]
        parts = [p for p in parts if not any(p is t for t in touching)] + [(members, hit)]
    covered = torch.stack([p[1] for p in parts]).any(0) if parts else torch.zeros(site.width, dtype=torch.bool)
    if not bool(covered.all()):
        return None
    return sorted(parts, key=lambda p: int(p[1].nonzero()[0]))


def _head(site: Site, members: Sequence[Member], columns: Tensor) -> Group:
    merged: list[Member] = []
    for name, axis, (start, stop) in sorted(members, key=lambda m: (m[0], m[2])):
        if merged and merged[-1][0] == name and merged[-1][2][1] == start:
            merged[-1] = (name, axis, (merged[-1][2][0], stop))
        else:
            merged.append((name, axis, (start, stop)))
    runs: list[list[int]] = []
    for j in columns.nonzero().flatten().tolist():
        if runs and runs[-1][1] == j:
            runs[-1][1] = j + 1
        else:
            runs.append([j, j + 1])
    merged += [(n, "columns", (a, b)) for n in site.linears for a, b in runs]
    return Group("head", tuple(merged))


def _routed_by_row(probe: Probe, router: str, own: Mapping[str, Any], experts: Sequence[int]) -> bool:
    """Whether expert e gets the tokens at which the router's row e is large, for every e."""
    x = probe.base.inputs[router].reshape(-1, probe.linears[router].in_features)
    scores = (x @ probe.tensor(f"{router}.weight").to(x.dtype).T).float()
    for e in experts:
        first = next(n for n, f in own.items() if f.expert == e)
        if first not in probe.base.inputs:
            return False
        mine = (x[:, None, :] == probe.base.inputs[first][None]).all(-1).any(1)
        if bool(mine.all()):
            continue  # every token takes every expert
        gap = (scores[mine].mean(0) - scores[~mine].mean(0)) / scores.std(0)
        if int(gap.argmax()) != e:
            return False
    return True
