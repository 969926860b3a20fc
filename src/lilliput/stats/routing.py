"""How a router used the experts of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Sums over `tokens` tokens, float64 on the CPU; of expert i, G_i(x) is the weight of its output E_i(x), 0 where it
    was not chosen.

    chosen: tokens that chose an expert, [experts]; gates: G_i, [experts]; norms: |G_i E_i(x)|, [experts]; ranked: the
    largest, second largest, .. weight of a token as a share of all its weights, [k]; logits: s sT of the router's
    logits s, [experts, experts].
    """

    tokens: int
    chosen: Tensor
    gates: Tensor
    norms: Tensor
    ranked: Tensor
    logits: Tensor

    def means(self, name: str) -> Tensor:
        """Of "chosen", "gates", "norms" or "ranked" the mean over the tokens."""
        value: Tensor = {"chosen": self.chosen, "gates": self.gates, "norms": self.norms, "ranked": self.ranked}[name]
        return value / max(self.tokens, 1)

    def alike(self) -> Tensor:
        """The cosine between the logits of each two experts over the tokens, [experts, experts]."""
        return cosines(self.logits)


def cosines(gram: Tensor) -> Tensor:
    """From inner products [n, n] the cosines between the n vectors; 0 beside a vector of zeros."""
    norms = gram.diagonal().clamp_min(0.0).sqrt()
    scale = torch.where(norms > 0.0, 1.0 / norms.clamp_min(torch.finfo(gram.dtype).tiny), torch.zeros_like(norms))
    return (gram * scale[:, None] * scale).clamp(-1.0, 1.0)
