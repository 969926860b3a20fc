"""What a rewrite sees of a block: its anatomy, its weights, and what calibration saw at its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.stats.site import SiteStats


@dataclass(frozen=True)
class BlockView:
    """A block's description and its linears' weights by name, float32 [out, in] (Conv1D weights already turned)."""

    anatomy: Block
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class BlockIO:
    """Statistics by site name, as collected before this step changes anything."""

    stats: Mapping[str, SiteStats]
