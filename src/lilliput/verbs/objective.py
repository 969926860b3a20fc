"""The verb `objective`: what training minimises.

An objective is named by a training step (`objective: logit-kd`), and is no step itself. It says what n tokens lose, a
few of them at a time, so that the distributions of a whole batch are never in memory at once; what models lose whose
hidden states are compared; and where the text of a step comes from, if the student writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lilliput.algebra.divergences import bucketed
from lilliput.errors import PlanError
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes


@dataclass(frozen=True)
class Taught:
    """A teacher's distributions after n tokens, at the objective's temperature.

    log_p: float32 [n, m], log-probabilities of the tokens ids int64 [n, m], or of the whole vocabulary in its order
    (ids None). log_rest: float32 [n], of all other tokens together; None where there are no others. log_label: float32
    [n], of the token that follows in the text. weight: float32 [n], what the token's loss is multiplied with; None: 1.
    """

    log_p: Tensor
    ids: Tensor | None = None
    log_rest: Tensor | None = None
    log_label: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class TokenIO:
    """n tokens of a batch whose successors count. logits: the student's, float32 [n, V]; labels: what follows, int64
    [n]; taught: None where the objective has no teacher; extra: float32 [n, k], what the objective's `rollout` has
    noted of the tokens, None where it is the lessons' own text."""

    logits: Tensor
    labels: Tensor
    taught: Taught | None
    extra: Tensor | None = None

    def need_taught(self) -> Taught:
        """Raises RuntimeError where the objective did not declare that it needs a teacher."""
        if self.taught is None:
            raise RuntimeError("the teacher was read but not asked for: set teaches=True in the objective's spec")
        return self.taught


@dataclass(frozen=True)
class Seen:
    """What a model shows of a batch, where the objective asks for it. hidden: [B, T, H] before the first block and
    after each; by block, or of the last one alone: attention [B, heads, T, T], probabilities; scores, the same before
    the softmax, -inf where nothing is seen; values [B, groups, T, d], one of a group of heads that share it."""

    hidden: Sequence[Tensor] = ()
    attention: Sequence[Tensor] = ()
    scores: Sequence[Tensor] = ()
    values: Sequence[Tensor] = ()


FIELDS = frozenset({"hidden", "attention", "scores", "values"})


@dataclass(frozen=True)
class FeatureIO:
    """A batch as student and teacher see it. counts: bool [B, T], the places after which a token counts; labels: int64
    [B, T], what follows each place (0 after the last); maps: the objective's own trained modules; heads: of student and
    teacher, from hidden states [n, H] after a block to logits float32 [n, V], with the final norm."""

    student: Seen
    teacher: Seen
    counts: Tensor
    labels: Tensor
    maps: nn.Module | None
    heads: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

    def need_maps(self) -> nn.Module:
        """Raises RuntimeError where the objective has declared no maps."""
        if self.maps is None:
            raise RuntimeError("maps were read but not made: set maps=... in the objective's spec")
        return self.maps


@dataclass(frozen=True)
class Widths:
    """Hidden size, number of blocks, and heads of student and teacher; groups: heads of keys and values."""

    student: int
    teacher: int
    blocks: int
    teacher_blocks: int
    heads: tuple[int, int] = (1, 1)
    groups: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class RolloutIO:
    """What an objective finds that has text written. ids, counts [B, T]: the step's lessons, as in `Lessons`; end: the
    token that ends a text, None: none does.

    `write(share, temperature, prompt)`: rows ids, counts [B, T] that begin as the lessons do, with `prompt` tokens or
    those that do not count, and go on with tokens drawn from share x teacher + (1 - share) x student, those that count.
    `judge(ids)`: log-probabilities of student and teacher of each token after those before it, float32 [B, T], 0 at the
    first.
    """

    ids: Tensor
    counts: Tensor
    write: Callable[[float, float, int], tuple[Tensor, Tensor]]
    judge: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rollout:
    """The text of a step: ids, counts [N, T] as in `Lessons`; extra: float32 [N, T, k], for the loss of each token."""

    ids: Tensor
    counts: Tensor
    extra: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective(Spec[OptionsT]):
    """`tokens_loss(io, options)`: the loss of each token, float32 [n]; the mean over all that count is minimised.
    `features_loss(io, options)`: a scalar that is added to it; `sees`: the fields of `Seen` that it compares, for which
    the teacher runs beside the student; `sees_last`: of the last block alone; `maps(widths, options)`: modules that are
    trained with the student and left behind after it, at `maps_rate` times its rate; `opening(options)`: how many steps
    they are trained alone before, by `opening_loss`; `refuses(widths, options)`: why two models cannot be compared.
    `teaches`: whether there is a teacher; `temperature(options)`: of its distributions.
    `prepare(taught, options)`: the options once the teacher's word on the whole text is known, a sample at a time;
    `weigh(log_label, options)`: factors [n] on the losses of a sample's tokens, from the teacher's log-probabilities of
    them. `rolls(options)`: whether the student writes text, by `rollout(io, options)`: the text of a step, None: the
    lessons. The teacher runs beside the student then, too.
    """

    verb: ClassVar[str] = "objective"
    family: ClassVar[str] = "objective"
    targeted: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.TRAINING

    tokens_loss: Callable[[TokenIO, OptionsT], Tensor] | None = None
    features_loss: Callable[[FeatureIO, OptionsT], Tensor] | None = None
    sees: Callable[[OptionsT], frozenset[str]] = lambda options: frozenset()
    sees_last: bool = False
    maps: Callable[[Widths, OptionsT], nn.Module | None] | None = None
    maps_rate: float = 10.0
    opening: Callable[[OptionsT], int] = lambda options: 0
    opening_loss: Callable[[FeatureIO, OptionsT], Tensor] | None = None
    refuses: Callable[[Widths, OptionsT], str | None] = lambda widths, options: None
    teaches: bool = True
    temperature: Callable[[OptionsT], float] = lambda options: 1.0
    prepare: Callable[[Iterable[Taught], OptionsT], OptionsT] | None = None
    weigh: Callable[[Tensor, OptionsT], Tensor] | None = None
    rolls: Callable[[OptionsT], bool] = lambda options: False
    rollout: Callable[[RolloutIO, OptionsT], Rollout | None] | None = None
    needs: tuple[str, ...] = ()
    writes: Writes = "values"

    def beside(self, options: OptionsT) -> bool:
        """Whether the teacher runs beside the student, whole in memory."""
        return bool(self.sees(options)) or self.rolls(options)

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        raise PlanError(
            f"{task.label} is what a training step minimises, and no step: name it there, as in "
            f"{{method: full, options: {{objective: {task.method.name}}}}}"
        )


Rest = Literal["bucket", "renormalised"]


def events(logits: Tensor, taught: Taught, temperature: float = 1.0, rest: Rest = "bucket") -> tuple[Tensor, Tensor]:
    """log p and log q, float32 [n, m], of teacher and student over the same events: the tokens that the teacher names
    and, where those are not all, the rest as one ("bucket"), or those alone, as if there were no others
    ("renormalised")."""
    scaled = logits if temperature == 1.0 else logits / temperature
    if taught.ids is None:
        return taught.log_p, scaled.log_softmax(-1)
    if rest == "renormalised":
        return taught.log_p.log_softmax(-1), scaled.gather(1, taught.ids).log_softmax(-1)
    if taught.log_rest is None:
        return taught.log_p, scaled.log_softmax(-1).gather(1, taught.ids)
    return torch.cat([taught.log_p, taught.log_rest[:, None]], 1), bucketed(scaled, taught.ids)
