"""The verb `behave`: what a written model leaves out while it runs, depending on what it reads.

Such a step changes no weight. It adds an entry to the folder's config, which `lilliput.runtime.behaviours` carries out
wherever the folder is loaded, and possibly a few tensors beside the weights, fitted to each finished block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lilliput.anatomy.model import Anatomy, Linear
from lilliput.errors import PlanError
from lilliput.machine.cost import Cost
from lilliput.streaming.peak import Run
from lilliput.verbs.spec import Around, OptionsT, Spec, Stage, Task, Writes

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Mlp:
    """The MLP of a block. name: its module's, within the block; rows: linears, within the MLP, that make the hidden
    channels, and columns: the one that reads them; inputs, width: of its inputs and hidden channels."""

    name: str
    rows: tuple[str, ...]
    columns: str
    inputs: int
    width: int


@dataclass(frozen=True)
class MlpIO:
    """What a finished block shows of its MLP. down: weight of its last linear, float32 [out, width]; passes(): what
    enters the MLP [n, inputs] and its last linear [n, width], float32, of all samples, some at a time."""

    mlp: Mlp
    down: Tensor
    passes: Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Behave(Spec[OptionsT]):
    """`entry(anatomy, options)`: the config's entry, as plain data; it raises PlanError where the model cannot do it.

    `fit(io, options)`: tensors for an MLP by their names below it, as `tensors(mlp, options)` describes them (both
    None: it has none, and looks at no samples); `mlps(anatomy)`: by block, the MLP that has them.
    """

    verb: ClassVar[str] = "behave"
    family: ClassVar[str] = "behaviour"
    single: ClassVar[bool] = True
    targeted: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.RUNNING

    entry: Callable[[Anatomy, OptionsT], dict[str, Any]]
    fit: Callable[[MlpIO, OptionsT], Mapping[str, Tensor]] | None = None
    tensors: Callable[[Mlp, OptionsT], Shapes] | None = None
    writes: Writes = "behaviour"

    def tokens(self, options: OptionsT) -> bool:
        return self.fit is not None

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        running = (Stage.RUNNING, Stage.CACHE)
        later = next((x for x in recipe[task.step :] if x.spec.stage not in running), None)
        if later is not None:
            raise PlanError(
                f"{task.label} says how the finished model runs, and {later.label} still changes it: move it to the end"
            )
        if any(x.method.name == task.method.name for x in recipe[: task.step]):
            raise PlanError(f"{task.label} stands in the recipe twice: keep one of them")

    def suits(self, task: Task, around: Around) -> None:
        try:
            self.entry(around.anatomy, self.options_of(task))
        except PlanError as error:
            raise PlanError(f"{task.label}: {error}") from None

    def cost(self, run: Run, linears: Sequence[Linear], options: OptionsT) -> Cost:
        """The Gram matrix of what enters an MLP, in float64 with its factor, and what MLPs are given at once."""
        if self.fit is None:
            return Cost()
        wide = max((x.in_features for x in linears), default=0)
        rows = run.batch * run.tokens
        ram = 3 * 8 * run.hidden**2 + 4 * wide * (run.hidden + 4 * rows)
        return Cost(ram=ram, operations=run.samples * run.tokens * (run.hidden**2 + sum(x.parameters for x in linears)))


def mlp_of(anatomy: Anatomy, block: int) -> Mlp:
    """The MLP of a block that is one module. Raises PlanError where there is none, or one of experts."""
    name = anatomy.block_names[block]
    linears = anatomy.blocks[block].linears
    rows = [x for x in linears if x.role in ("gate", "up")]
    columns = [x for x in linears if x.role == "down"]
    if any(x.expert is not None for x in linears) or len(columns) != 1 or len(rows) not in (1, 2):
        raise PlanError(
            f"{name} of {anatomy.architecture} has no single MLP whose linears make hidden channels one by one and "
            "read them again: leave the step out"
        )
    parents = {x.name.rpartition(".")[0] for x in (*rows, *columns)}
    if len(parents) != 1 or "" in parents or any(x.transposed for x in (*rows, *columns)):
        raise PlanError(
            f"the linears of the MLP in {name} of {anatomy.architecture} are not plain linears of one module of their "
            "own, which is where gates would be put: leave the step out"
        )
    (parent,) = parents
    short = [x.name.removeprefix(f"{parent}.") for x in rows]
    inputs, width = rows[0].in_features, columns[0].in_features
    return Mlp(parent, tuple(short), columns[0].name.removeprefix(f"{parent}."), inputs, width)


def tensors(task: Task, anatomy: Anatomy, block: int) -> Shapes:
    """What a step adds to a block: dtype and shape by full name."""
    spec = task.of(Behave)
    if spec.tensors is None:
        return {}
    mlp = mlp_of(anatomy, block)
    prefix = f"{anatomy.block_names[block]}.{mlp.name}"
    return {f"{prefix}.{name}": x for name, x in spec.tensors(mlp, task.options).items()}
