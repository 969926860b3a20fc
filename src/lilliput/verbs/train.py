"""The verb `train`: the whole model is trained once its blocks are done, against the model that it was made of.

What is trained of a linear is a `Trained` (`lilliput.verbs.trained`): leaves, and the weight that they stand for.
Everything else of a training step is the same for all methods, and an option here: the objective, text, optimizer and
schedule. The linears keep what they are stored as, so that the plan knows every byte before anything is trained.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.machine.cost import Cost, Phase
from lilliput.parts.layer import Layer
from lilliput.parts.scheme import Scheme
from lilliput.streaming.peak import Run
from lilliput.target import Strict
from lilliput.verbs.spec import OptionsT, Spec, Stage, Task, Writes
from lilliput.verbs.trained import Trained


class TrainOptions(Strict):
    """What every training step can be told."""

    objective: str = Field("logit-kd", description="what is minimised: a method of the verb `objective`")
    objective_options: Mapping[str, Any] = Field(default_factory=dict, description="options of the objective")
    steps: int = Field(200, ge=0, description="steps of the optimizer")
    minutes: float | None = Field(
        None, gt=0.0, description="stop after so many minutes of steps, and let schedules reach their end by then"
    )
    batch: int = Field(4, ge=1, description="samples in a step")
    at_once: int | None = Field(
        None, ge=1, description="samples in memory at a time, whose gradients are added up; none: one"
    )
    lr: float = Field(1e-4, gt=0.0, description="learning rate after warming up, of a weight")
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="share of the steps in which the rate rises")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate falls afterwards")
    weight_decay: float = Field(0.0, ge=0.0, description="share of a weight that leaves in a step, times the rate")
    clip: float | None = Field(1.0, gt=0.0, description="largest norm of a step's gradient; none: no limit")
    optimizer: Literal["adamw", "adamw-8bit", "paged"] = Field(
        "adamw", description="adamw: moments in float32; adamw-8bit: in 8 bits; paged: in float32, on disk"
    )
    data: str | Mapping[str, float] | None = Field(
        None,
        description="text to train on, as --data, or several texts with their weights; self: what the teacher writes; "
        "none: that of the calibration",
        json_schema_extra={"names": "text"},
    )
    documents: bool = Field(
        False, description="rows of a data set are documents that do not see each other; chats always are"
    )
    greedy: tuple[int, int] | None = Field(
        None,
        description="with data self: each text begins with a random token and so many of the likeliest, from the first "
        "number to the second, before the rest is drawn (LLM-QAT: 3 to 5); none: all is drawn",
    )
    tokens: int = Field(512, ge=2, description="tokens of a sample")
    top: int | None = Field(
        64, ge=1, description="tokens of which the teacher's probabilities are kept, the rest being one; none: all"
    )
    held_out: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of the samples that is not trained on: what loses least there is kept, not what comes last",
    )
    checkpointing: bool = Field(
        True, description="keep of each block its inputs alone, and run it again on the way back"
    )
    driver: Literal["auto", "whole", "streamed"] = Field(
        "auto",
        description="whole: the model is in memory; streamed: one block of it, the rest in files, with the same "
        "numbers, several times slower; auto: whole where --memory allows it",
    )
    shard: bool | None = Field(
        None,
        description="several processes share out the weights of the blocks, and not the samples alone; none: where the "
        "method allows it",
    )
    others: tuple[str, ...] = Field((), description='tensors outside the linears that are trained too, as "*norm*"')
    save: int = Field(25, ge=1, description="steps between two states from which a killed run goes on")
    seed: int = Field(0, ge=0, description="of the order of samples and whatever is drawn")

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that `data` names."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data or ())

    def trains(self, name: str) -> bool:
        """Whether a tensor outside the linears is trained too."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.others)


@dataclass(frozen=True, kw_only=True)
class Learning(Spec[OptionsT]):
    """What all steps have that train a finished folder. `restarts(options)`: where they begin at the original's
    weights, the value of `start` that begins at those which the steps before have left; None where they do."""

    stage: ClassVar[Stage] = Stage.TRAINING

    needs: tuple[str, ...] = ()
    writes: Writes = "values"
    restarts: Callable[[OptionsT], str | None] = lambda options: None

    def tokens(self, options: OptionsT) -> bool:
        return common(options).data is None

    def begins(self, task: Task, changed: str) -> None:
        """Raises PlanError where the step begins at the original's weights, and `changed` has left others in their
        place."""
        other = self.restarts(self.options_of(task))
        if other is not None:
            raise PlanError(
                f"{task.label} begins at the original's weights, and {changed} has left others in their place: set its "
                f"option `start` to {other}"
            )


@dataclass(frozen=True, kw_only=True)
class Train(Learning[OptionsT]):
    """`begin(layer, original, options)`: what is trained of a linear, from the layer as the steps before have left it
    and its weight before them, float32 [out, in]. `admits(scheme, options)`: why a linear that is stored so cannot be
    trained; None where it can. `moves`: it moves zeros, whose number a step before it has planned. `copies`: float32
    copies of a weight that it holds, its gradients and moments included.
    """

    verb: ClassVar[str] = "train"
    family: ClassVar[str] = "train"

    begin: Callable[[Layer, Tensor, OptionsT], Trained]
    admits: Callable[[Scheme, OptionsT], str | None]
    copies: int = 5
    moves: bool = False

    def ordered(self, task: Task, recipe: Sequence[Task]) -> None:
        later = next((x for x in recipe[task.step + 1 :] if x.spec.stage is not Stage.TRAINING), None)
        if later is not None:
            raise PlanError(
                f"{later.label} would undo what {task.label} has trained: move it before that, or write a folder first "
                "and compress it again"
            )
        changed = moved(recipe[: task.step])
        if changed is not None:
            self.begins(task, changed)
        before = [x for x in recipe[: task.step] if x.spec.stage is not Stage.TRAINING]
        if self.moves and before and not any(x.spec.writes == "support" for x in before):
            raise PlanError(
                f"{task.label} moves zeros, and no step before it says how many there are: put `magnitude` with the "
                "sparsity or pattern that you want in front of it"
            )

    def trains(self, task: Task, schemes: Mapping[str, Scheme]) -> None:
        for name, scheme in schemes.items():
            reason = self.admits(scheme, self.options_of(task))
            if reason is not None:
                raise PlanError(f"{task.label} on {name}: {reason}")

    def phases(self, run: Run, options: OptionsT) -> tuple[Phase, ...]:
        """The whole model: what is trained, its copies, and what a sample leaves for the way back. What a streamed
        training takes depends on the model's head, which the plan knows."""
        o = common(options)
        if o.driver == "streamed":
            return ()
        weights = sum(x.parameters for block in run.blocks for x in block.linears)
        tables = 2 * run.vocabulary * run.hidden
        held = self.copies * weights
        if o.shard and run.processes > 1:  # a block at a time is whole, with its gradients, as it is sent and received
            most = max(sum(x.parameters for x in block.linears) for block in run.blocks)
            held = -(-held // run.processes) + (self.copies + 2) * most
        ram = 4 * (held + tables) + (o.at_once or 1) * o.tokens * 4 * sum(kept(run))
        return (Phase("training", Cost(ram=ram)),)


def kept(run: Run) -> list[int]:
    """How many numbers each block leaves of a token for the way back, at most."""
    return [
        8 * run.hidden + sum(x.out_features for x in block.linears) + sum(site.width for site in block.sites)
        for block in run.blocks
    ]


def moved(recipe: Sequence[Task]) -> str | None:
    """The first of some steps after which weights are no longer those of the original, nor codes of them."""
    return next((x.label for x in recipe if x.spec.stage is Stage.TRAINING or x.spec.folds(x.options)), None)


def common(options: Any) -> TrainOptions:
    """The options that all training steps have. Raises RuntimeError for those of another verb."""
    if not isinstance(options, TrainOptions):
        raise RuntimeError("these are no options of a training step")
    return options
