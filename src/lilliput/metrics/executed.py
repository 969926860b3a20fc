"""Share of work executed: of the multiply-adds of the blocks' linears, those that a model with behaviours does.

Counted on the tokens of the evaluation: a token that has left a prompt takes no linear of a later block, and a gated
MLP as many rows and columns as its gates let through, besides its predictor. A model without behaviours executes all of
them, and has no such figure. What a machine computes and sets to zero afterwards counts as left out: the share says
what need not be done, not how long it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lilliput.metrics.metric import Metric
from lilliput.model.weights import Model
from lilliput.runtime import behaviours
from lilliput.runtime.behaviours.gates import gated
from lilliput.runtime.behaviours.layer import BehavingLayer


@dataclass(frozen=True)
class Executed:
    """executed, dense: multiply-adds with the behaviours and without; predicted: the share that the rules alone give
    for windows of this size; prompt: tokens of a window that were read as a prompt, and lengths: the keys and values
    that each block keeps of them (None: no tokens are pruned)."""

    executed: int
    dense: int
    prompt: int | None = None
    lengths: tuple[int, ...] | None = None
    predicted: float | None = None

    @property
    def share(self) -> float:
        return self.executed / self.dense if self.dense else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        lengths = None if self.lengths is None else list(self.lengths)
        own = {"executed": self.executed, "dense": self.dense, "share": self.share, "predicted": self.predicted}
        return own if lengths is None else own | {"prompt": self.prompt, "kv_lengths": lengths}

    def note(self) -> str:
        """In a sentence."""
        words = f"behaviours leave {1 - self.share:.1%} of the multiply-adds of the blocks' linears out"
        if self.lengths is None:
            return words
        return (
            f"{words}; the first {self.prompt} tokens of each window are its prompt, of which the last block keeps "
            f"{self.lengths[-1]}, and only what follows them is scored"
        )


def prunes(model: Model) -> bool:
    """Whether tokens of a prompt leave the model on the way."""
    state = behaviours.of(model.skeleton.model)
    return state is not None and state.rule is not None


def predicted(model: Model, prompt: int, tokens: int) -> float:
    """The share of work that a model with behaviours will do of windows of `tokens` tokens, the first `prompt` of which
    are a prompt, by its rules alone: nothing is run."""
    state = behaviours.require(model.skeleton.model)
    done = whole = 0
    for layer in (x for x in model.skeleton.model.modules() if isinstance(x, BehavingLayer)):
        entering = prompt if state.rule is None else state.rule.entering(layer.number, prompt)
        present = entering + tokens - prompt
        whole += layer.weights * tokens
        done += layer.weights * present + sum(x.gates.expected(present) for x in gated(layer))
    return done / whole if whole else 1.0


def executed(model: Model, prompt: int, tokens: int) -> Executed | None:
    """What the model has done since its count was cleared, in windows of `tokens` tokens; None for one without
    behaviours."""
    state = behaviours.of(model.skeleton.model)
    if state is None:
        return None
    state.work.share()
    lengths = state.lengths(prompt)
    share = predicted(model, prompt, tokens)
    return Executed(state.work.executed, state.work.dense, None if lengths is None else prompt, lengths, share)


METRIC = Metric(
    how="lilliput eval DIR",
    key="work.share, work.predicted, work.executed, work.dense, work.kv_lengths",
    unit="share, multiply-adds",
    interval="none: counted exactly",
    covers=(),
)
