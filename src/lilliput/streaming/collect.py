"""Statistics of what enters the sites of a block, collected while forward passes go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lilliput.anatomy.model import Site
from lilliput.anatomy.skeleton import Skeleton
from lilliput.model.weights import Model
from lilliput.progress import Progress
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.streaming import lockstep
from lilliput.streaming.forward import embed, through
from lilliput.streaming.states import Activations
from lilliput.streaming.walk import resident

Needs = Mapping[str, frozenset[str]]  # names of statistics by site


def tap(skeleton: Skeleton, block: int, site: Site) -> lockstep.Tap:
    """Where the inputs of a site of a loaded block show: at the first linear that reads them."""
    return lockstep.Tap(site.name, skeleton.block(block).get_submodule(site.linears[0]))


class Collector:
    """The statistics `needs` of some sites of a loaded block; a site's buffers live from its first inputs on."""

    def __init__(self, skeleton: Skeleton, block: int, sites: Sequence[Site], needs: Needs) -> None:
        self._skeleton, self._needs = skeleton, needs
        self._prefix = skeleton.block_names[block]
        self._width = {site.name: site.width for site in sites}
        self._states: dict[str, SiteStats] = {}
        self.taps = [tap(skeleton, block, site) for site in sites]

    def see(self, site: str, x: Tensor) -> None:
        """Fold in inputs x [..., width] of a site."""
        state = self._states.pop(site, None) or self._empty(site)
        self._states[site] = fold.update(state, x)

    def take(self, site: str) -> SiteStats:
        """The finished statistics of a site, which are forgotten here; those of no tokens where it saw none.

        All ranks call it for the same sites in the same order. Raises SourceError where inputs overflow.
        """
        state = self._states.pop(site, None) or self._empty(site)
        return fold.complete(state, f"{self._prefix}.{site}", self._skeleton.dtype)

    def _empty(self, site: str) -> SiteStats:
        return fold.init(self._width[site], self._needs[site], self._skeleton.device)


def collect(
    skeleton: Skeleton,
    block: int,
    sites: Sequence[Site],
    needs: Needs,
    passes: Sequence[Callable[[], None]],
    *,
    stop_after: bool = False,
) -> dict[str, SiteStats]:
    """Run forward passes through a loaded block, one after the other: the statistics of its `sites`, by site name.

    `stop_after`: a pass is left once it has met all sites, see `lockstep.watch`.
    """
    collector = Collector(skeleton, block, sites, needs)
    lockstep.watch(collector.taps, passes, collector.see, stop_after=stop_after)
    return {site.name: collector.take(site.name) for site in sites}


def statistics(
    model: Model, ids: Tensor, batch: int, states: Activations, needs: frozenset[str]
) -> Iterator[tuple[int, dict[str, SiteStats]]]:
    """Take ids int64 [N, T] through all blocks: (block, statistics `needs` of all its sites, by site name).

    `states` [N, T, H] holds what enters each block and then what leaves it. Blocks are not in memory any more when
    their statistics are shown.
    """
    blocks = model.anatomy().blocks
    batches = embed(model, ids, batch, states)
    for block in resident(model):
        sites = blocks[block].sites
        passes = through(model.skeleton, block, batches, states, states)
        stats = collect(model.skeleton, block, sites, {site.name: needs for site in sites}, passes)
        model.unload_block(block)
        yield block, stats
        del stats  # not beside the next block's


def site_statistics(
    model: Model, ids: Tensor, folder: Path, needs: frozenset[str], *, batch: int = 4, progress: Progress | None = None
) -> dict[str, SiteStats]:
    """Statistics of the inputs of every site of every block, by its full name; ids int64 [N, T]."""
    names = model.skeleton.block_names
    result: dict[str, SiteStats] = {}
    states = Activations(
        folder / "sites.bin", (*ids.shape, model.skeleton.hidden_size), model.skeleton.dtype, create=True
    )
    try:
        with torch.no_grad():
            for block, of_block in statistics(model, ids, batch, states, needs):
                result.update({f"{names[block]}.{site}": stats for site, stats in of_block.items()})
                if progress is not None:
                    progress.step(block + 1, len(names))
    finally:
        states.delete()
    return result
