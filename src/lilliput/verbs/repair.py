"""The verb `repair`: weights of an edited block that make up for what has left, before anything else happens to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lilliput.anatomy.model import Linear
from lilliput.errors import PlanError
from lilliput.machine.cost import Cost, Phase
from lilliput.streaming import peak
from lilliput.streaming.peak import Run
from lilliput.verbs import order
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes
from lilliput.verbs.view import FitBlock, FitIO


@dataclass(frozen=True)
class Consumer:
    """A linear some of whose inputs have left. weight: the unedited one, float32 [out, width]; halves: Gram matrices of
    its inputs in the unedited block, on what now enters that, float32 [width, width], of each half of the samples;
    kept: the inputs that stay, int64 [in]."""

    weight: Tensor
    halves: tuple[Tensor, Tensor]
    kept: Tensor


@dataclass(frozen=True)
class RepairIO:
    """What an edited block gets, and what it should give.

    fit: inputs as the edited blocks before it give them; targets: what the unedited model has after the block and all
    that left behind it, for its own inputs. consumers(): by name, the linears whose inputs have left in part.
    passes(linear, weights): (half of the samples, what enters the linear, what the block gives, targets), the half 0 or
    1, the others [n, tokens, ..], float32, for all samples, with `weights` [out, in] in place of some linears' own.
    """

    fit: FitIO
    consumers: Callable[[], Mapping[str, Consumer]]
    passes: Callable[[str, Mapping[str, Tensor]], Iterator[tuple[int, Tensor, Tensor, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Repair(Spec[OptionsT]):
    """`run(block, io, options)`: new weights [out, in] by linear, of an edited block.

    `copies`: float32 copies of a block's weights that it holds at once; `looks(options, samples)`: samples that it
    looks at, forward and back, of so many.
    """

    verb: ClassVar[str] = "repair"
    family: ClassVar[str] = "repair"
    single: ClassVar[bool] = True
    targeted: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.BLOCK

    run: Callable[[FitBlock, RepairIO, OptionsT], Mapping[str, Tensor]]
    copies: int
    looks: Callable[[OptionsT, int], int]
    writes: Writes = "fold"

    def tokens(self, options: OptionsT) -> bool:
        return True

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        if not any(x.spec.verb == "edit" for x in recipe[: task.step]):
            raise PlanError(
                f"{task.label} makes up for what an edit has taken away, and none stands before it: put it after one, "
                "such as flap or drop-layers"
            )
        turning = next((x for x in recipe if x.spec.turns), None)
        if turning is not None:
            raise PlanError(
                f"{task.label} compares blocks with the unedited model, which {turning.label} turns: leave one of the "
                "two out"
            )
        order.before_values(task, recipe)

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        weights = sum(x.parameters for x in linears)
        looked = (3 * self.looks(options, run.samples) + 2 * run.samples) * run.tokens
        return Cost(ram=weights * 4 * self.copies, operations=looked * weights)

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        """An edited block with its copies beside the unedited one and its Gram matrices."""
        ram, before = 0, run if run.before is None else run.before
        unedited = max(peak.of_resident(before, x, grams=False, lockstep=False).ram for x in before.kinds)
        grams = 40 * max(site.width for block in before.kinds for site in block.sites) ** 2
        for block in run.kinds:
            weights = sum(x.parameters for x in block.linears)
            wide = sum(x.out_features for x in block.linears) + sum(site.width for site in block.sites)
            token = 4 * 8 * run.hidden + run.itemsize * wide
            own = weights * (4 * self.copies + run.itemsize)
            ram = max(ram, own + unedited + grams + run.batch * run.tokens * token)
        return (Phase("repairing a block", Cost(ram=ram)),)
