"""The loop that trains a whole model: gradients of a batch, a step of the optimizer, a state to go on from."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lilliput.errors import LilliputError
from lilliput.progress import Progress
from lilliput.training.student import Student
from lilliput.training.text import Text
from lilliput.verbs.train import TrainOptions


class Place(Protocol):
    """Where the state of a training lies meanwhile."""

    def load(self) -> Mapping[str, Tensor] | None:
        """The last state that was saved, None: there is none."""
        ...

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """In place of the last one, whole or not at all."""
        ...


@dataclass(frozen=True)
class Curve:
    """How a training went. losses: mean over the tokens of each step; stopped: why it ended before the last step."""

    losses: tuple[float, ...]
    seconds: float
    stopped: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "seconds": self.seconds, "stopped": self.stopped}


@dataclass
class _Run:
    """What changes while a training goes on."""

    student: Student
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def state(self) -> dict[str, Tensor]:
        tensors = {f"value.{name}": x.detach() for name, x in self.parameters.items()}
        for name, x in self.parameters.items():
            for key, value in self.optimizer.state.get(x, {}).items():
                tensors[f"{key}.{name}"] = torch.as_tensor(value)
        for linear, core in self.student.cores().items():
            tensors |= {f"core:{linear}:{name}": x for name, x in core.state().items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        return {name: x.contiguous().cpu() for name, x in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, x in self.parameters.items():
                x.copy_(tensors[f"value.{name}"])
                own = {
                    key.removesuffix(f".{name}"): value.clone()
                    for key, value in tensors.items()
                    if key.endswith(f".{name}") and not key.startswith("value.")
                }
                own = {key: value for key, value in own.items() if "." not in key}
                if own:
                    self.optimizer.state[x] = own
            for linear, core in self.student.cores().items():
                for name, held in core.state().items():
                    held.copy_(tensors[f"core:{linear}:{name}"])
        self.losses = tensors["losses"].tolist()
        self.seconds = float(tensors["seconds"])


def order(count: int, o: TrainOptions) -> list[list[int]]:
    """The samples of each step: every sample once before any comes again."""
    generator = torch.Generator().manual_seed(o.seed)
    line: list[int] = []
    out: list[list[int]] = []
    for _ in range(o.steps):
        while len(line) < o.batch:
            line += torch.randperm(count, generator=generator).tolist()
        out.append(line[: o.batch])
        line = line[o.batch :]
    return out


def rate(step: int, o: TrainOptions) -> float:
    """The factor on the learning rate at a step from 0."""
    warm = max(1, round(o.warmup * o.steps)) if o.warmup else 0
    if step < warm:
        return (step + 1) / warm
    if o.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, o.steps - warm)
    return 1 - done if o.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def leaves(student: Student, o: TrainOptions) -> tuple[dict[str, nn.Parameter], list[dict[str, Any]]]:
    """What is trained by name, and the optimizer's groups: those of linears at rates of their own, and `others`."""
    named: dict[str, nn.Parameter] = {}
    groups: list[dict[str, Any]] = []
    for linear, core in student.cores().items():
        rates = core.rates()
        for name, value in core.named_parameters():
            named[f"{linear}.{name}"] = value
            decay = 0.0 if name in rates else o.weight_decay
            groups.append({"params": [value], "weight_decay": decay, "factor": rates.get(name, 1.0)})
    inside = {id(x) for x in named.values()}
    for name, value in student.model.named_parameters():
        if id(value) not in inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in o.others):
            value.requires_grad_()
            named[name] = value
            groups.append({"params": [value], "weight_decay": 0.0, "factor": 1.0})
    if student.maps is not None and student.compared is not None:
        for name, value in student.maps.named_parameters():
            named[f"maps.{name}"] = value
            groups.append({"params": [value], "weight_decay": 0.0, "factor": student.compared.rate})
    return named, groups


def train(student: Student, text: Text, o: TrainOptions, place: Place, progress: Progress) -> Curve:
    """Carry out the steps, from the last saved state on where there is one.

    Raises LilliputError where a loss is not finite, with the batch; the last good state stays saved. A first Ctrl-C
    ends the training with what it has reached.
    """
    parameters, groups = leaves(student, o)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, foreach=False)
    run = _Run(student, optimizer, parameters)
    if (saved := place.load()) is not None:
        run.restore(saved)
    plan, stopped = order(len(text.lessons), o), None
    began = time.monotonic() - run.seconds
    try:
        for step in range(len(run.losses), o.steps):
            if o.minutes is not None and time.monotonic() - began > 60 * o.minutes:
                stopped = f"after {o.minutes:g} minutes"
                break
            run.losses.append(_step(run, text, plan[step], step, o))
            run.seconds = time.monotonic() - began
            progress.step(step + 1, o.steps, f"loss {run.losses[-1]:.4f}")
            if (step + 1) % o.save == 0:
                place.save(run.state())
    except KeyboardInterrupt:
        stopped = "by the keyboard"
    if stopped is not None:
        stopped = f"{stopped}, at step {len(run.losses)} of {o.steps}"
    return Curve(tuple(run.losses), run.seconds, stopped)


def _step(run: _Run, text: Text, samples: Sequence[int], step: int, o: TrainOptions) -> float:
    """One step; the mean loss of its tokens."""
    torch.manual_seed(o.seed * 1_000_003 + step)  # whatever is drawn is the same after a resume
    student = run.student
    for core in student.cores().values():
        core.step(step / max(o.steps, 1))
    rows = text.rows(samples)
    counted = rows.tokens
    if not counted:
        raise LilliputError(
            f"no token counts in the samples {list(samples)} of step {step + 1}: give text with longer answers, or "
            "larger batches"
        )
    run.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for n, batch in enumerate(text.batches(rows, o.at_once or 1)):
        loss = student(batch) / counted
        penalty = _penalty(student) if n == 0 else None
        total += float(loss.detach())
        (loss if penalty is None else loss + penalty).backward()
    if not math.isfinite(total):
        raise LilliputError(
            f"the loss is {total} at step {step + 1} (samples {list(samples)}): the state of step "
            f"{step - step % o.save} is saved; lower lr, or check the text"
        )
    if o.clip is not None:
        nn.utils.clip_grad_norm_(list(run.parameters.values()), o.clip)
    for group in run.optimizer.param_groups:
        group["lr"] = o.lr * group["factor"] * rate(step, o)
    for core in student.cores().values():
        core.after_backward()
    run.optimizer.step()
    for core in student.cores().values():
        core.after_step(o.lr * rate(step, o))
    return total


def _penalty(student: Student) -> Tensor | None:
    terms = [x for core in student.cores().values() if (x := core.penalty()) is not None]
    return None if not terms else torch.stack(terms).sum()
