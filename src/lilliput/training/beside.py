"""A teacher that runs beside the student, whole in memory: where its hidden states are compared, or where it judges
text that the student has written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
from lilliput.model.weights import Model
from lilliput.training.watch import watching
from lilliput.verbs.objective import Seen, Taught

LOGITS = 1 << 24  # logits that are in memory at a time


@dataclass(frozen=True)
class Look:
    """A teacher's view of a batch. taught: of the tokens that count, from number a to b; head: from hidden states after
    a block to logits."""

    seen: Seen
    taught: Callable[[int, int], Taught]
    head: Callable[[Tensor], Tensor]


class Beside:
    """Loads all of a teacher; `close` lets it go. fields, last: what is watched, as in `watching`."""

    def __init__(
        self,
        teacher: Model,
        fields: frozenset[str],
        last: bool,
        temperature: float,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = teacher
        self._fields, self._last = fields, last
        self._temperature, self._weigh = temperature, weigh
        teacher.load(tuple(teacher.skeleton.shapes))

    @torch.no_grad()
    def look(self, ids: Tensor, counts: Tensor, positions: Tensor | None) -> Look:
        """ids, counts [B, T] as in `Lessons`."""
        skeleton = self.model.skeleton
        with watching(skeleton, self._fields, self._last) as shown:
            finished = skeleton.read(ids, positions)
        chosen = counts[:, 1:].to(finished.device)
        states, labels = finished[:, :-1][chosen], ids[:, 1:].to(finished.device)[chosen]
        weights = None if self._weigh is None else self._weights(states, labels, chosen)

        def taught(a: int, b: int) -> Taught:
            log_p = self._log_p(states[a:b])
            label = log_p.gather(1, labels[a:b, None])[:, 0]
            return Taught(log_p, log_label=label, weight=None if weights is None else weights[a:b])

        return Look(shown(), taught, lambda hidden: head(skeleton, hidden))

    @torch.no_grad()
    def judge(self, ids: Tensor) -> Tensor:
        """See `judged`."""
        return judged(self.model.skeleton, ids)

    def _log_p(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return (self.model.skeleton.logits(states) / self._temperature).log_softmax(-1)

    def _weights(self, states: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
        if self._weigh is None:
            raise RuntimeError("nothing weighs these tokens")
        size = pieces(self.model.skeleton)
        known = [
            self._log_p(states[a : a + size]).gather(1, labels[a : a + size, None])[:, 0]
            for a in range(0, len(states), size)
        ]
        rows = torch.split(torch.cat(known), chosen.sum(1).tolist()) if known else ()
        return torch.cat([self._weigh(x) for x in rows]) if known else states.new_zeros(0)

    def close(self) -> None:
        self.model.unload(tuple(self.model.skeleton.shapes))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pieces(skeleton: Skeleton) -> int:
    """Tokens whose logits are in memory at a time."""
    return max(1, LOGITS // skeleton.shapes[skeleton.head][0])


def head(skeleton: Skeleton, hidden: Tensor) -> Tensor:
    """Logits float32 [n, V] of hidden states [n, H] after a block, as if it were the last; gradients pass."""
    return skeleton.logits(skeleton.finish(hidden[None])[0])


def judged(skeleton: Skeleton, ids: Tensor) -> Tensor:
    """Log-probabilities of each token after those before it, float32 [B, T], 0 at the first."""
    finished = skeleton.read(ids)
    states, labels = finished[:, :-1].flatten(0, 1), ids[:, 1:].to(finished.device).flatten()
    size = pieces(skeleton)
    found = [
        skeleton.logits(states[a : a + size]).log_softmax(-1).gather(1, labels[a : a + size, None])[:, 0]
        for a in range(0, len(states), size)
    ]
    return torch.nn.functional.pad(torch.cat(found).view(len(ids), -1), (1, 0))
