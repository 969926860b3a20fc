"""The verb `choose`: each linear gets one grid of a menu, so that a size or an average of bits is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lilliput.algebra import compiled
from lilliput.anatomy.model import Linear
from lilliput.budget import menu
from lilliput.errors import PlanError
from lilliput.machine.cost import Cost, Phase
from lilliput.stats.site import SiteStats
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.target import Target
from lilliput.verbs import order
from lilliput.verbs.spec import Around, OptionsT, Spec, Stage, Task, Writes


@dataclass(frozen=True)
class Goal:
    """What is to be kept: the most bytes of the written folder or file, the average of stored bits over the linears
    that take part, or the seconds of a decoding step, as they are predicted
    for a device of `efficiency`."""

    size: int | None = None
    bits: float | None = None
    seconds: float | None = None
    device: str | None = None


@dataclass(frozen=True)
class Trials:
    """Over how many samples changes are tried (None: a 32nd of all), with which factor on the error of linears that are
    changed alone, and with which ones on those of all linears at once."""

    samples: int | None
    alone: float
    whole: tuple[float, ...]


@dataclass(frozen=True)
class Stores:
    """Among which ways of storing keys and values each block gets one, so that they and the folder keep to a size
    together. context: tokens of the one sequence that counts; method: the one of the verb `cache`; bits: its entries,
    beside leaving them as they are; options: the method's, for all of them."""

    context: int
    method: str
    bits: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Choose(Spec[OptionsT]):
    """`score(weight, stats, targets, rows, options)`: for each target, the squared error that it leaves in the outputs
    of a linear, summed over tokens and outputs.

    weight float32 [out, in]; `rows` float32 [out] weighs outputs, or None: all alike. `entries(options)`: the menu
    (`budget.menu`); `goal(options)`, `trials(options)`; `stores(options)`: what is chosen for keys and values, None:
    they do not count; `fused(options)`: what an engine runs as one linear gets one grid; `governs`: methods whose error
    `score` predicts.
    """

    verb: ClassVar[str] = "choose"
    family: ClassVar[str] = "choose"
    stage: ClassVar[Stage] = Stage.TARGETS

    score: Callable[[Tensor, SiteStats, Sequence[Target], Tensor | None, OptionsT], tuple[float, ...]]
    entries: Callable[[OptionsT], tuple[str, ...]]
    goal: Callable[[OptionsT], Goal]
    trials: Callable[[OptionsT], Trials]
    stores: Callable[[OptionsT], Stores | None] = lambda options: None
    fused: Callable[[OptionsT], bool]
    governs: tuple[str, ...]
    writes: Writes = "targets"

    def looked_at(self, samples: int, options: OptionsT) -> int:
        """On how many of so many calibration samples changes are tried."""
        asked = self.trials(options).samples
        return min(max(1, samples // 32) if asked is None else asked, samples)

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        order.before_spending(task, recipe)
        if sum(x.spec.stage is Stage.TARGETS for x in recipe) > 1:
            raise PlanError(f"{task.label} decides all of a target, so no other step of the recipe can divide it")

    def suits(self, task: Task, around: Around) -> None:
        order.governing(task, around)
        for other in around.governed.values():
            if other.method.name not in self.governs:
                raise PlanError(
                    f"{task.label}: it predicts the loss of {' or '.join(self.governs)}, not of "
                    f"'{other.method.name}': put such a step after it"
                )

    def farthest(self, target: Target, options: OptionsT) -> tuple[Target, ...]:
        """Grids that stand beside each other, whatever their groups: a row's own always fits."""
        entries = self.entries(options)
        targets = [menu.on(target, x).model_copy(update={"group_size": -1}) for x in (entries[0], entries[-1])]
        return tuple(dict.fromkeys(targets))

    def tokens(self, options: OptionsT) -> bool:
        return True

    def together(self, name: str, linear: Linear, options: OptionsT) -> str:
        if not self.fused(options):
            return name
        parent = name.rpartition(".")[0]
        if linear.expert is not None:
            return "experts"  # engines read all experts of a model by one scheme
        for roles in (("q", "k", "v"), ("gate", "up")):
            if linear.role in roles:
                return f"{parent}.{'+'.join(roles)}"
        return name

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        trials = self.trials(options)
        caches = len(run.blocks) if self.stores(options) is not None else 0
        # Each linear and each cache is changed alone, and half of the blocks come after it.
        runs = ((len(linears) + caches) / 2 + len(trials.whole)) * self.looked_at(run.samples, options)
        return Cost(
            ram=peak.of_decomposing(linears).ram,
            operations=run.weights * (2.0 * runs * run.tokens + 40 * len(self.entries(options))),
        )

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        making = max(peak.of_decomposing(block.linears).ram for block in run.kinds)
        return (Phase("trying out candidates", peak.of_loss(run, making)),)

    def resident(self, target: Target, options: OptionsT) -> int:
        """The compiled search for codes, where grids of the menu have some, and the target that stands for them not."""
        coded = any(menu.turned(menu.on(target, x)) for x in self.entries(options))
        return compiled.MEMORY if coded and compiled.available() and not menu.turned(target) else 0
