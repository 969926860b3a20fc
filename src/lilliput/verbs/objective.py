"""The verb `objective`: what training minimises.

An objective is named by a training step (`objective: logit-kd`), and is no step itself. It says what n tokens lose, a
few of them at a time, so that the distributions of a whole batch are never in memory at once; or what models lose whose
hidden states are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.errors import PlanError
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes


@dataclass(frozen=True)
class Taught:
    """A teacher's distributions after n tokens, at the objective's temperature.

    log_p: float32 [n, m], log-probabilities of the tokens ids int64 [n, m], or of the whole vocabulary in its order
    (ids None). log_rest: float32 [n], of all other tokens together; None where there are no others.
    """

    log_p: Tensor
    ids: Tensor | None = None
    log_rest: Tensor | None = None


@dataclass(frozen=True)
class TokenIO:
    """n tokens of a batch whose successors count. logits: the student's, float32 [n, V]; labels: what follows, int64
    [n]; taught: None where the objective has no teacher."""

    logits: Tensor
    labels: Tensor
    taught: Taught | None

    def need_taught(self) -> Taught:
        """Raises RuntimeError where the objective did not declare that it needs a teacher."""
        if self.taught is None:
            raise RuntimeError("the teacher was read but not asked for: set teaches=True in the objective's spec")
        return self.taught


@dataclass(frozen=True)
class Seen:
    """What a model shows of a batch, where the objective asks for it. hidden: [B, T, H] before the first block and
    after each; attention: by block [B, heads, T, T], probabilities; queries, keys, values: by block [B, heads, T, d] as
    the attention uses them, before rotation."""

    hidden: Sequence[Tensor] = ()
    attention: Sequence[Tensor] = ()
    queries: Sequence[Tensor] = ()
    keys: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()


@dataclass(frozen=True)
class FeatureIO:
    """A batch as student and teacher see it. counts: bool [B, T], the tokens that are no padding; maps: the
    objective's own trained modules."""

    student: Seen
    teacher: Seen
    counts: Tensor
    maps: nn.Module | None


@dataclass(frozen=True)
class Widths:
    """Hidden size and number of blocks of student and teacher."""

    student: int
    teacher: int
    blocks: int
    teacher_blocks: int


@dataclass(frozen=True, kw_only=True)
class Objective(Spec[OptionsT]):
    """`tokens_loss(io, options)`: the loss of each token, float32 [n]; the mean over all that count is minimised.
    `features_loss(io, options)`: a scalar that is added to it; `sees`: the fields of `Seen` that it compares, for which
    the teacher runs beside the student; `maps(widths, options)`: modules that are trained with the student and left
    behind after it. `teaches`: whether there is a teacher; `temperature(options)`: of its distributions.
    """

    verb: ClassVar[str] = "objective"
    family: ClassVar[str] = "objective"
    targeted: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.TRAINING

    tokens_loss: Callable[[TokenIO, OptionsT], Tensor] | None = None
    features_loss: Callable[[FeatureIO, OptionsT], Tensor] | None = None
    sees: Callable[[OptionsT], frozenset[str]] = lambda options: frozenset()
    maps: Callable[[Widths, OptionsT], nn.Module | None] | None = None
    teaches: bool = True
    temperature: Callable[[OptionsT], float] = lambda options: 1.0
    needs: tuple[str, ...] = ()
    writes: Writes = "values"

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        raise PlanError(
            f"{task.label} is what a training step minimises, and no step: name it there, as in "
            f"{{method: full, options: {{objective: {task.method.name}}}}}"
        )


def events(logits: Tensor, taught: Taught, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p and log q, float32 [n, m], of teacher and student over the same events: the tokens that the teacher names
    and, where those are not all, the rest as one."""
    log_q = (logits / temperature).log_softmax(-1)
    if taught.ids is None:
        return taught.log_p, log_q
    named = log_q.gather(1, taught.ids)
    if taught.log_rest is None:
        return taught.log_p, named
    others = log_q.scatter(1, taught.ids, -torch.inf)
    rest = others.logsumexp(1)
    return torch.cat([taught.log_p, taught.log_rest[:, None]], 1), torch.cat([named, rest[:, None]], 1)
