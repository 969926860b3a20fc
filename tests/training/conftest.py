"""A small student whose linears are trained as they are, and what it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from lilliput.data.lessons import Lessons, whole
from lilliput.methods.train.full import Full
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.training import loop
from lilliput.training.loop import Curve
from lilliput.training.student import Student
from lilliput.training.text import Text
from lilliput.training.whole import Whole
from lilliput.verbs.objective import TokenIO
from lilliput.verbs.train import TrainOptions


def cross_entropy(io: TokenIO) -> Tensor:
    """Of each token."""
    return torch.nn.functional.cross_entropy(io.logits, io.labels, reduction="none")


@dataclass
class Memory:
    """A `whole.Place` that keeps what is saved as bytes, as a file would."""

    folder: Path
    held: dict[str, bytes] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)

    def load(self, name: str) -> Mapping[str, Tensor] | None:
        return load(self.held[name]) if name in self.held else None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.held[name] = save(dict(tensors))
        self.saved.append(name)


@dataclass
class Class:
    """Makes students of one model, and trains them."""

    model: Path
    folder: Path
    lessons: Lessons

    def student(self, **more: Any) -> Student:
        model = open_model(self.model)
        blocks = zip(model.skeleton.block_names, model.anatomy().blocks, strict=True)
        names = {f"{prefix}.{x.name}.weight" for prefix, block in blocks for x in block.linears}
        model.load(x for x in model.skeleton.shapes if x not in names)
        student = Student(model.skeleton, cross_entropy, **more)
        for name in sorted(names):
            student.place(name.removesuffix(".weight"), Full(Layer(name.removesuffix(".weight"), model.read(name))))
        return student

    def trainer(self, o: TrainOptions, place: Memory | None = None, student: Student | None = None) -> Whole:
        student = self.student(checkpointing=o.checkpointing) if student is None else student
        return Whole(student, Text(self.lessons), o, Memory(self.folder) if place is None else place)

    def train(self, o: TrainOptions, place: Memory | None = None, student: Student | None = None) -> Curve:
        return loop.train(self.trainer(o, place, student), self.lessons, o, Quiet())

    @staticmethod
    def values(student: Student) -> dict[str, Tensor]:
        """What is trained, by name."""
        pairs = [(f"{name}.{x}", p) for name, core in student.cores().items() for x, p in core.named_parameters()]
        return {name: p.detach().clone() for name, p in pairs}

    @staticmethod
    def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 0.0) -> bool:
        """Whether all tensors agree."""
        return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=0, atol=atol) for n in a)

    @staticmethod
    def memory(folder: Path) -> Memory:
        """A place to save in."""
        return Memory(folder)


def rows(count: int, tokens: int = 12, seed: int = 0) -> Tensor:
    """Tokens of which some repeat, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(1, 48, (count, 1), generator=generator)
    return (start + torch.arange(tokens) * 3) % 47 + 1


@pytest.fixture
def small(noisy: Callable[[int], Path], tmp_path: Path) -> Class:
    return Class(noisy(0), tmp_path, whole(rows(6), "rows"))
