"""What a loaded model with behaviours knows of them: the rules, whether they run, and the work done and left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lilliput.errors import SourceError

TOKENS, GATES = "token-pruning", "dynamic-pruning"


@dataclass(frozen=True)
class TokenRule:
    """Of the prompt's tokens that are left, ceil(keep * n) go on after each of `layers`."""

    layers: tuple[int, ...]
    keep: float

    def entering(self, layer: int, prompt: int) -> int:
        """How many of `prompt` tokens enter a layer."""
        for _ in (x for x in self.layers if x < layer):
            prompt = self.leaving(prompt)
        return prompt

    def leaving(self, entering: int) -> int:
        """How many of the prompt's tokens go on after a layer that prunes."""
        return share(self.keep, entering)


def share(keep: float, count: int) -> int:
    """ceil(keep * count), at least 1; what a float adds beyond that is no token."""
    return min(count, max(min(1, count), math.ceil(keep * count - 1e-9)))


@dataclass
class Work:
    """Multiply-adds of the blocks' linears for the tokens that went through: `dense` without behaviours, `executed`
    with them, the predictors' own included."""

    dense: int = 0
    executed: int = 0
    _late: list[Tensor] = field(default_factory=list)

    def tokens(self, weights: int, all_of_them: int, present: int) -> None:
        """`present` of so many tokens went through linears with this number of weights."""
        self.dense += weights * all_of_them
        self.executed += weights * present

    def change(self, count: int | Tensor) -> None:
        """What gates saved (below 0) or predictors took; a tensor is read only when somebody asks."""
        if isinstance(count, int):
            self.executed += count
            return
        self._late.append(count)
        if len(self._late) > 1000:
            self._settle()

    def _settle(self) -> None:
        if self._late:
            self.executed += int(torch.stack(self._late).sum())
        self._late = []

    def share(self) -> float:
        """Executed over dense; 1 where nothing ran."""
        self._settle()
        return self.executed / self.dense if self.dense else 1.0

    def clear(self) -> None:
        self.dense, self.executed, self._late = 0, 0, []


@dataclass
class Behaviours:
    """The behaviours of one model.

    prompt: tokens of the prompt where an evaluation reads prompt and continuation at once (None: all tokens of a first
    pass are the prompt, or, where `strict`, nobody has said); mask: the name of the static mask in use; recorder:
    called with what enters the last linear of each gated MLP, which runs whole meanwhile.
    """

    blocks: tuple[str, ...]
    rule: TokenRule | None = None
    gated: tuple[str, ...] = ()
    prompt: int | None = None
    active: bool = True
    strict: bool = False
    mask: str | None = None
    work: Work = field(default_factory=Work)
    recorder: Callable[[Any, Any, Tensor], None] | None = None

    def lengths(self, prompt: int) -> tuple[int, ...] | None:
        """Keys and values that each layer keeps of a prompt; None where no token is pruned."""
        if self.rule is None:
            return None
        return tuple(self.rule.entering(n, prompt) for n in range(len(self.blocks)))


def parsed(entries: Sequence[Mapping[str, Any]]) -> Behaviours:
    """From the entry `behaviours` of a config. Raises SourceError for a kind that this code does not know."""
    state = Behaviours(())
    try:
        for entry in entries:
            if entry["kind"] not in (TOKENS, GATES):
                raise SourceError(
                    f"the folder has the behaviour '{entry['kind']}', which this lilliput does not know: install the "
                    "version that wrote it"
                )
            state.blocks = tuple(entry["blocks"])
            if entry["kind"] == TOKENS:
                state.rule = TokenRule(tuple(int(x) for x in entry["layers"]), float(entry["keep"]))
            else:
                state.gated = tuple(entry["mlps"])
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"the entry 'behaviours' of quantization_config is damaged: {error!r}") from None
    return state
