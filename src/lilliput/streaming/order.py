"""The order in which the sites of a block are reached, and how many of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lilliput.anatomy.model import Block, Site
from lilliput.machine import ranks
from lilliput.streaming import lockstep


def as_met(
    anatomy: Block, sites: Sequence[Site], taps: Sequence[lockstep.Tap], first_pass: Sequence[Callable[[], None]]
) -> Sequence[Site]:
    """Sites in the order in which a forward pass meets them; `taps` are theirs. The same on all ranks.

    A chain of stages leaves no choice. Elsewhere, where attention and MLP run side by side or among experts, the first
    batch shows it (that of the rank whose batch meets the most); experts that it leaves out stand by their number, as
    all of them run one after the other.
    """
    if len({site.stage for site in sites}) == len(sites):
        return sites
    places: dict[str, int] = {}

    def see(site: str, _: Tensor) -> None:
        places.setdefault(site, len(places))

    lockstep.watch(taps, first_pass, see, stop_after=False)
    order = max(ranks.gathered(places), key=len)
    expert = {site.name: anatomy.linear(site.linears[0]).expert for site in sites}
    first = min((n for name, n in order.items() if expert[name] is not None), default=len(order))

    def place(site: Site) -> tuple[int, int, int]:
        number = expert[site.name]
        if number is not None:
            return first, number, site.stage
        return order.get(site.name, len(order)), -1, site.stage

    return sorted(sites, key=place)


def waves(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites whose statistics are taken in one run: of one stage, and no more Gram matrices than two of the widest."""
    room = 2 * max((site.width for site in sites), default=1) ** 2
    groups: list[list[Site]] = []
    for site in sites:
        last = groups[-1] if groups else []
        if last and last[-1].stage == site.stage and sum(s.width**2 for s in (*last, site)) <= room:
            last.append(site)
        else:
            groups.append([site])
    return groups
