"""Lottery tickets: train, prune the smallest weights, put the others back to where they began, and train again.

In each of `rounds` rounds the weights are trained under the mask; at its end the share p^(1/n) of those that were left
stays, by size, p the planned share and n the rounds, and every weight goes back to its value at the start. After the
last of them the ticket is trained once more: rounds take the share `until` of the steps, equally, and that takes the
rest. The original is what the weights begin with, as in tickets of models that were trained before.

Papers: Frankle & Carbin 2019, arXiv 1803.03635; of pre-trained models: Chen et al. 2020, arXiv 2007.12223. Cost: the
weights at the start beside a weight, its gradient and two moments. Limits: the optimizer's moments and its rate are
not put back: they go on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from lilliput.parts.layer import Layer
from lilliput.training.sparse import Latent, SparseOptions, admits, restarts
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained


class Options(SparseOptions):
    """See the module's docstring. `sparse_from`, `begin` and `every` have no meaning here."""

    rounds: int = Field(3, ge=1, description="how often weights are pruned and put back")
    rewind: bool = Field(True, description="false: weights are pruned in rounds, and not put back")


class Ticket(Latent):
    """Weights that go back to `first`."""

    settings: Options
    first: Tensor
    round: Tensor

    def __init__(self, layer: Layer, original: Tensor, o: Options) -> None:
        super().__init__(layer, original, o)
        self.register_buffer("first", self.value.detach().clone())
        self.register_buffer("round", torch.zeros((), dtype=torch.int64))

    def state(self) -> Mapping[str, Tensor]:
        return {"mask": self.mask, "round": self.round}

    def scores(self) -> Tensor:
        # Those that have left stay out, however large they were.
        return torch.where(self.mask, self.value.detach().abs(), -1.0)

    def stays(self, number: int) -> float:
        """The share of the weights that is left after so many rounds."""
        return float((self._kept() / self.mask.numel()) ** (number / self.settings.rounds))

    def step(self, done: float) -> None:
        o = self.settings
        ends = [round(o.until * o.steps * n / o.rounds) for n in range(1, o.rounds + 1)]
        due = sum(round(done * o.steps) >= end for end in ends)
        with torch.no_grad():
            while int(self.round) < due:
                self.round += 1
                self.mask.copy_(self._smaller(int(self.round)))
                if o.rewind:
                    self.value.copy_(self.first)

    def _smaller(self, number: int) -> Tensor:
        if number == self.settings.rounds:
            return self.chosen(1.0)
        size = self.mask.numel()
        if self.pattern is not None:
            return self.chosen(number / self.settings.rounds)
        return self.largest(max(self.count, round(self.stays(number) * size)))


def begin(layer: Layer, original: Tensor, o: Options) -> Trained:
    """The original's weights, to which they will go back."""
    return Ticket(layer, original, o)


_PRUNED = {"method": "magnitude", "target": {"sparsity": 0.5}}

METHOD = Train(
    paper="Frankle & Carbin 2019, arXiv 1803.03635",
    options=Options,
    covers={
        "lottery-ticket": [_PRUNED, {"method": "lottery-ticket"}],
        "prune-and-tune": [_PRUNED, {"method": "lottery-ticket", "options": {"rewind": False}}],
        "bert-lottery": [_PRUNED, {"method": "lottery-ticket", "options": {"rounds": 1}}],
    },
    recipe=[_PRUNED, {"method": "lottery-ticket"}],
    begin=begin,
    admits=admits,
    copies=6,
    moves=True,
    restarts=restarts,
)
