"""What the embedding and the head see of calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from lilliput.anatomy.tables import HEAD
from lilliput.machine import ranks
from lilliput.model.weights import Model
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.streaming.states import Activations


def head_inputs(model: Model, hidden: Activations, needs: frozenset[str]) -> SiteStats:
    """Statistics of what the head reads, over the samples of all ranks."""
    skeleton = model.skeleton
    state = fold.init(skeleton.hidden_size, needs, skeleton.device)
    model.load(skeleton.final)
    try:
        for i in range(len(hidden)):
            state = fold.update(state, skeleton.finish(hidden.read(i, i + 1).to(skeleton.device)))
    finally:
        model.unload(skeleton.final)
    return fold.complete(state, HEAD, skeleton.dtype)


def lookups(width: int, needs: frozenset[str], device: str) -> SiteStats:
    """Statistics of inputs that weigh errors in all columns alike: those of a table that is only looked up."""
    return fold.finish(fold.update(fold.init(width, needs, device), torch.eye(width, device=device)))


def token_counts(ids: Tensor, vocabulary: int) -> Tensor:
    """How often each token occurs in the samples of all ranks, float32 [vocabulary]."""
    return ranks.add(torch.bincount(ids.reshape(-1), minlength=vocabulary).float())
