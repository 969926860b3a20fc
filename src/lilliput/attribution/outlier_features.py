"""Outlier features: the channels of inputs that some token makes large, in how many blocks, and for how many tokens.

A channel j of a site (what a few linears of a block read) is hit where some |X_tj| >= alpha. For each, with the site of
that name in all blocks taken together: the number of blocks that hit it, the largest share of tokens that do so in one
of them, and the largest |X_tj|. It is systematic where a quarter of the blocks hit it and in one of them 6 % of the
tokens do (the paper's rule). Channels of what enters attention or an MLP are those of the residual stream, so that the
same ones recur; channels between the linears of a block are its own.

They decide how inputs can be rounded: none, and a scale for each token will do; few systematic ones, and `llm-int8`
leaves them out, `smoothquant` moves them into the weights; a rotation spreads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput.metrics.metric import Metric
from lilliput.model.weights import Model
from lilliput.stats.site import SiteStats
from lilliput.streaming import lockstep
from lilliput.streaming.collect import Collector
from lilliput.streaming.forward import embed, through
from lilliput.streaming.states import Activations
from lilliput.streaming.walk import resident

_BLOCKS, _TOKENS = 0.25, 0.06  # of what is systematic
_MOST = 50  # channels that are listed
_NEEDS = frozenset({"absmax", "square"})


@dataclass
class Channels:
    """Of the sites of one name: blocks that have it; by channel, blocks hit, the largest share of tokens, and the
    largest input, [width]."""

    width: int
    sites: int = 0
    blocks: Tensor = field(default_factory=lambda: torch.zeros(0))
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0))
    absmax: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        self.blocks, self.tokens, self.absmax = (torch.zeros(self.width) for _ in range(3))

    def add(self, hits: Tensor, stats: SiteStats) -> None:
        """One block more: of `stats.count` tokens, how many were large in each channel, [width]."""
        self.sites += 1
        self.blocks += (hits > 0).float()
        self.tokens = torch.maximum(self.tokens, hits / max(stats.count, 1))
        self.absmax = torch.maximum(self.absmax, stats.need("absmax").cpu())


@dataclass(frozen=True)
class Outliers:
    """`stats`: "absmax" and "square" of every site, by its full name; `channels`: by a site's name in its block, and
    its width, for blocks that differ."""

    alpha: float
    stats: dict[str, SiteStats]
    channels: dict[tuple[str, int], Channels]

    def to_json(self) -> dict[str, Any]:
        """Plain data: how many channels are hit, and the worst of them."""
        rows: list[dict[str, Any]] = []
        for (site, width), found in self.channels.items():
            for j in found.blocks.nonzero()[:, 0].tolist():
                share, tokens = float(found.blocks[j]) / found.sites, float(found.tokens[j])
                row = {"site": site, "width": width, "channel": j, "blocks": int(found.blocks[j])}
                row |= {"share_of_blocks": share, "share_of_tokens": tokens, "absmax": float(found.absmax[j])}
                rows.append(row | {"systematic": share >= _BLOCKS and tokens >= _TOKENS})
        rows.sort(key=lambda x: (-x["systematic"], -x["share_of_blocks"], -x["share_of_tokens"], x["channel"]))
        return {
            "alpha": self.alpha,
            "hit": len(rows),
            "systematic": sum(row["systematic"] for row in rows),
            "of": sum(width for _, width in self.channels),
            "channels": rows[:_MOST],
        }


def measured(model: Model, ids: Tensor, folder: Path, alpha: float, *, batch: int = 4) -> Outliers:
    """Take ids int64 [N, T] through all blocks, one of them in memory at a time; `folder` is for hidden states."""
    skeleton, blocks = model.skeleton, model.anatomy().blocks
    found = Outliers(alpha, {}, {})
    shape = (*ids.shape, skeleton.hidden_size)
    states = Activations(folder / "outliers.bin", shape, skeleton.dtype, create=True)
    try:
        with torch.no_grad():
            batches = embed(model, ids, batch, states)
            for block in resident(model):
                sites = blocks[block].sites
                collector = Collector(skeleton, block, sites, {site.name: _NEEDS for site in sites})
                hits = {site.name: torch.zeros(site.width) for site in sites}
                passes = through(skeleton, block, batches, states, states)
                lockstep.watch(collector.taps, passes, _counting(collector, hits, alpha), stop_after=False)
                for site in sites:
                    stats = collector.take(site.name)
                    found.stats[f"{skeleton.block_names[block]}.{site.name}"] = stats
                    key = site.name, site.width
                    found.channels.setdefault(key, Channels(site.width)).add(hits[site.name], stats)
    finally:
        states.delete()
    return found


def _counting(collector: Collector, hits: dict[str, Tensor], alpha: float) -> Callable[[str, Tensor], None]:
    def see(site: str, x: Tensor) -> None:
        collector.see(site, x)
        hits[site] += (x.detach().abs() >= alpha).reshape(-1, x.shape[-1]).sum(0).float().cpu()

    return see


METRIC = Metric(
    how="lilliput inspect MODEL --data docs --alpha 6",
    key="outlier_features.hit, outlier_features.systematic, outlier_features.channels[]",
    unit="channels, share of blocks, share of tokens",
    interval="none: of the text at hand",
    covers=("outlier-features",),
    paper="Dettmers et al. 2022, arXiv 2208.07339",
)
