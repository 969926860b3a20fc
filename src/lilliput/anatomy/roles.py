"""What each linear is for, found by watching where its output goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.anatomy.model import Link, Role, Site
from lilliput.anatomy.probe import Probe, differs


@dataclass(frozen=True)
class Flow:
    """For each linear the sites whose inputs change with it at once: not through another linear."""

    direct: Mapping[str, tuple[str, ...]]
    mixing: tuple[str, ...]  # sites that read attention's output: they see other tokens, no earlier site does


def flow(probe: Probe, sites: Sequence[Site]) -> Flow:
    """Find who feeds whom. Experts are taken to be alike: only the first that ran is changed."""
    stage = {s.name: s.stage for s in sites}
    direct: dict[str, tuple[str, ...]] = {}
    reach: dict[str, set[str]] = {}
    seen_family: dict[str, str] = {}
    for site in reversed(sites):
        for name in site.linears:
            linear = probe.linears[name]
            twin = seen_family.setdefault(linear.family, name)
            if twin != name:
                direct[name] = _of_expert(direct[twin], probe, twin, name)
                continue
            everything = torch.ones(linear.out_features, dtype=torch.bool)
            run = probe.look(probe.noise(name, everything))
            hit = {
                s.name
                for s in sites
                if stage[s.name] > site.stage
                and (s.name not in run.inputs or differs(run.inputs[s.name], probe.base.inputs[s.name]))
            }
            reach[name] = hit
            by_others = {t for s in hit for n in _site(sites, s).linears for t in reach.get(n, ())}
            direct[name] = tuple(s.name for s in sites if s.name in hit - by_others)
    return Flow(direct, _mixing(probe, sites))


def roles(probe: Probe, sites: Sequence[Site], links: Sequence[Link], feeds: Flow) -> dict[str, Role]:
    """A role for every linear; "other" where looking does not tell."""
    out: dict[str, Role] = {}
    producers: dict[str, list[str]] = {}
    for name, targets in feeds.direct.items():
        for target in targets:
            producers.setdefault(target, []).append(name)
    linked = {(x.producer, x.site): x for x in links if x.kind == "linear"}
    for name, linear in probe.linears.items():
        if linear.router or linear.out_features == 1:  # one row: how much of a path each token takes
            out[name] = "router"
    for site in sites:
        feeders = [n for n in producers.get(site.name, ()) if n not in out]
        if not feeders:
            continue
        if site.name in feeds.mixing:
            out |= dict.fromkeys(site.linears, "o")
            out |= _attention(probe, site, feeders, linked)
        elif all(not feeds.direct[n] or out.get(n) == "down" for n in site.linears):
            mlp = _mlp(probe, site, feeders, linked)
            if mlp:
                out |= dict.fromkeys(site.linears, "down")
                out |= mlp
    return {name: out.get(name, "other") for name in probe.linears}


def _attention(
    probe: Probe, site: Site, feeders: Sequence[str], linked: Mapping[tuple[str, str], Link]
) -> dict[str, Role]:
    out: dict[str, Role] = {}
    for name in feeders:
        link = linked.get((name, site.name))
        rows = probe.linears[name].out_features
        if link is not None or _moves(probe, name, site, at=0, watch=0):
            whole = link is not None and len(set(link.index.tolist())) == rows
            out[name] = "v" if whole else "qkv"
        else:
            out[name] = "k" if _moves(probe, name, site, at=1, watch=2) else "q"
    if "q" in out.values() or "k" in out.values():  # keys and values in one, queries apart: none of the fused roles
        out = {n: "other" if r == "qkv" else r for n, r in out.items()}
    return out


def _mlp(probe: Probe, site: Site, feeders: Sequence[str], linked: Mapping[tuple[str, str], Link]) -> dict[str, Role]:
    if len(feeders) == 1:
        fused = probe.linears[feeders[0]].out_features >= 2 * site.width
        return {feeders[0]: "gate_up" if fused else "up"}
    if len(feeders) != 2 or any(probe.linears[n].out_features != site.width for n in feeders):
        return {}
    ups = [n for n in feeders if (n, site.name) in linked]
    if len(ups) == 2:  # a gate with ReLU scales as well; the names decide
        ups = [n for n in ups if "gate" not in n.rpartition(".")[2]][:1]
    if len(ups) != 1:
        return {}
    return {n: "up" if n == ups[0] else "gate" for n in feeders}


def _moves(probe: Probe, name: str, site: Site, at: int, watch: int) -> bool:
    """Whether changing a linear's output at token `at` changes the site's input at token `watch`."""

    def hook(_: torch.nn.Module, __: object, out: Tensor) -> Tensor:
        rows = out.reshape(probe.batch, probe.tokens, -1).clone()
        rows[:, at] = rows[:, at].roll(1, 0) + 0.5
        return rows.reshape(out.shape)

    handle = probe.block.get_submodule(name).register_forward_hook(hook)
    try:
        run = probe.look()
    finally:
        handle.remove()
    before, after = (probe.per_token(x.inputs[site.name]) for x in (probe.base, run))
    return before is not None and after is not None and differs(after[:, watch], before[:, watch])


def _mixing(probe: Probe, sites: Sequence[Site]) -> tuple[str, ...]:
    """Sites of the earliest stage whose last token sees a change of the first token."""
    hidden = probe.hidden.clone()
    hidden[:, 0] = hidden[:, 0].roll(1, 0) + 0.5
    run = probe.look(hidden=hidden)
    hit = []
    for site in sites:
        before = probe.per_token(probe.base.inputs[site.name])
        after = run.inputs.get(site.name)
        if before is None or after is None or after.shape != probe.base.inputs[site.name].shape:
            continue
        if differs(after.reshape(before.shape)[:, -1], before[:, -1]):
            hit.append(site)
    first = min((s.stage for s in hit), default=-1)
    return tuple(s.name for s in hit if s.stage == first)


def _site(sites: Sequence[Site], name: str) -> Site:
    return next(s for s in sites if s.name == name)


def _of_expert(targets: Sequence[str], probe: Probe, twin: str, name: str) -> tuple[str, ...]:
    """The twin expert's targets with this expert's number in their names."""
    bank = probe.linears[name].family.partition(".*.")[0]
    mine, other = f"{bank}.{probe.linears[name].expert}.", f"{bank}.{probe.linears[twin].expert}."
    return tuple(mine + t.removeprefix(other) if t.startswith(other) else t for t in targets)
