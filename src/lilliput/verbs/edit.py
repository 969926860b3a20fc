"""The verb `edit`: what leaves the model. Scored in a pass over the blocks, decided once, sliced while it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lilliput.errors import PlanError
from lilliput.machine.cost import Cost, Phase
from lilliput.model.edit import Edit as Decision
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.verbs.edits import EditIO, EditScores, EditView, Sizes, SkipLoss, Units, keep_best
from lilliput.verbs.gated import GateOptions, Training
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes
from lilliput.verbs.timing import Timing
from lilliput.verbs.train import common

if TYPE_CHECKING:
    from lilliput.source import Source


@dataclass(frozen=True, kw_only=True)
class Edit(Spec[OptionsT]):
    """`sizes(units, options)`: how much stays, from shapes alone; `run(scores, units, sizes, options)`: what stays, by
    default what scores highest.

    `score(view, io, options)`: scores of one block (None: shapes decide). `loss`: in place of scores, what stays by the
    losses of the model without some of its blocks (None from it: by scores after all). `gradients(options)`: whether a
    score reads gradients and their squares; `gates(options)`: whether it reads the derivatives of single samples by
    gates; `outputs(options)`: whether it reads covariances of output gradients; `similar(options)`: whether it reads
    how alike a block's inputs and outputs are; `branches(options)`: whether it reads what its branches add;
    `routed(options)`: whether it reads how tokens use experts.
    `update(view, io, stays, options)`: weights float32 of linears that lost rows or columns, [what stays of them], from
    another backward pass after the decision where `updates(options)` says so; stays: by the keys of `EditScores`.
    `timed(options)`: a table of times that `run` finds in its sizes, noted in the journal (None: it needs none).
    `looked_at(samples, options)`: samples that losses or gradients are taken over, of so many.
    `vocabulary(source, data, options)`: token ids that stay, by the tokenizer and a text (that of `data` where the
    options name none), known when the plan is made; what reads text later reads it through the smaller tokenizer.
    `trained(units, sizes, options)`: gates that are trained before the decision, whose chances to be open are the
    scores in place of what `score` gives; what they are, and what was trained of the weights beside them, goes into the
    weights of what stays. Its options are `GateOptions`. `narrows(options)`: it decides which channels of the residual
    stream stay, by number.
    `turned`: it keeps the first channels of a residual stream that a step before it has turned.
    """

    verb: ClassVar[str] = "edit"
    family: ClassVar[str] = "edit"
    single: ClassVar[bool] = True
    targeted: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.MODEL

    sizes: Callable[[Sequence[Units], OptionsT], Sizes]
    run: Callable[[Sequence[EditScores], Sequence[Units], Sizes, OptionsT], Decision] = keep_best
    score: Callable[[EditView, EditIO, OptionsT], EditScores] | None = None
    loss: Callable[[SkipLoss, Sequence[Units], Sizes, OptionsT], Decision | None] | None = None
    gradients: Callable[[OptionsT], bool] | None = None
    gates: Callable[[OptionsT], bool] | None = None
    outputs: Callable[[OptionsT], bool] | None = None
    similar: Callable[[OptionsT], bool] | None = None
    branches: Callable[[OptionsT], bool] | None = None
    routed: Callable[[OptionsT], bool] | None = None
    update: Callable[[EditView, EditIO, Mapping[str, tuple[int, ...]], OptionsT], Mapping[str, Tensor]] | None = None
    updates: Callable[[OptionsT], bool] | None = None
    timed: Callable[[OptionsT], Timing | None] | None = None
    vocabulary: Callable[[Source, str, OptionsT], tuple[int, ...]] | None = None
    trained: Callable[[Sequence[Units], Sizes, OptionsT], Training] | None = None
    narrows: Callable[[OptionsT], bool] | None = None
    turned: bool = False
    looked_at: Callable[[int, OptionsT], int] | None = None
    writes: Writes = "fold"

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        if any(x.spec.settles for x in recipe[: task.step]):
            raise PlanError(
                f"{task.label} takes parts of the model away, and an earlier step has already decided the values of "
                "its weights: move it to the front"
            )
        before = recipe[: task.step]
        if self.vocabulary is not None and before:
            raise PlanError(
                f"{task.label} decides which tokens there are, and all other steps read text in these: move it in "
                f"front of {before[0].label}"
            )
        if self.turned and not any(x.spec.turns for x in before):
            raise PlanError(
                f"{task.label} keeps the first channels of a turned residual stream: put `principal` before it, which "
                "turns it so that they hold most"
            )
        wrong = [x for x in before if x.spec.stage is not Stage.MODEL or (x.spec.turns and not self.turned)]
        if wrong:
            raise PlanError(f"{task.label} edits the whole model: move it in front of {wrong[0].label}")

    def asks(self, what: Callable[[OptionsT], bool] | None, options: OptionsT) -> bool:
        """Whether its scores read what one of the functions above tells of."""
        return what is not None and what(options)

    def slopes(self, options: OptionsT) -> bool:
        """Whether its scores come from a backward pass."""
        return any(self.asks(x, options) for x in (self.gradients, self.gates, self.outputs))

    def watches(self, options: OptionsT) -> bool:
        """Whether that pass has to show more than gradients by weights."""
        return bool(self.read(options)) or self.asks(self.gates, options) or self.asks(self.outputs, options)

    def looks_alike(self, options: OptionsT) -> bool:
        """Whether its scores read how alike a block's inputs and outputs are."""
        return self.asks(self.similar, options)

    def sees_routing(self, options: OptionsT) -> bool:
        """Whether its scores read how tokens use experts."""
        return self.routed is not None and self.routed(options)

    def tokens(self, options: OptionsT) -> bool:
        looks = any(self.asks(x, options) for x in (self.similar, self.branches, self.routed))
        wanted = self.trained is not None and common(options).data is None
        return self.loss is not None or looks or wanted or self.slopes(options)

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        """The model is scored before anything has left it."""
        if self.vocabulary is not None:
            return ()
        run = replace(run.before, batch=run.batch) if run.before is not None else run
        gram = "gram" in self.read(options)
        phases = [Phase("scoring what may leave", Cost(ram=max(peak_of(run, gram))))]
        if self.slopes(options):
            beside = _squares(run) if self.asks(self.gradients, options) else 0
            beside += _matrices(run, gram, self.asks(self.outputs, options))
            phases.append(Phase("the backward pass of an edit", peak.of_gradients(run) + Cost(ram=beside)))
            if self.asks(self.updates, options):
                beside += max(4 * sum(x.parameters for x in block.linears) for block in run.kinds)
                phases.append(Phase("the backward pass for its update", peak.of_gradients(run) + Cost(ram=beside)))
        if self.trained is not None:
            phases += gates_cost(run, options)
        if self.loss is not None:
            phases.append(Phase("losses without single blocks", peak.of_loss(run, 0)))
        return tuple(phases)


_SCRATCH = 4 * 8  # bytes by which float64 copies of the largest matrix of a site go beyond it while units are scored


def peak_of(run: Run, gram: bool = False) -> list[int]:
    """By kind of block, its weights in float32 and as it runs, beside a forward pass and its statistics."""
    return [
        peak.of_resident(run, block, grams=gram, lockstep=False).ram
        + peak.of_forward(run, block, gram=gram).ram
        + 8 * sum(x.parameters for x in block.linears)
        + gram * _SCRATCH * max(site.width for site in block.sites) ** 2
        for block in run.kinds
    ]


def _matrices(run: Run, gram: bool, outputs: bool) -> int:
    """Gram matrices of inputs and of output gradients, and what is made of the largest."""
    most = 0
    for block in run.kinds:
        sides = [site.width for site in block.sites] if gram else []
        sides += [x.out_features for x in block.linears] if outputs else []
        most = max(most, sum(4 * n * n for n in sides) + _SCRATCH * max(sides, default=0) ** 2)
    return most


def _squares(run: Run) -> int:
    return max(8 * sum(x.parameters for x in block.linears) for block in run.kinds)


def gates_cost(run: Run, options: Any) -> tuple[Phase, ...]:
    """The whole model while its gates are trained, and what a sample leaves for the way back."""
    o = common(options)
    weights = sum(x.parameters for block in run.blocks for x in block.linears)
    tables = 2 * run.vocabulary * run.hidden
    copies = 4 if isinstance(o, GateOptions) and o.weights == "trained" else 1
    token = 4 * sum(
        8 * run.hidden + 2 * sum(x.out_features for x in block.linears) + 2 * sum(site.width for site in block.sites)
        for block in run.blocks
    )
    ram = 4 * (copies * weights + tables) + (o.at_once or 1) * o.tokens * token
    return (Phase("the training of gates", Cost(ram=ram)),)
