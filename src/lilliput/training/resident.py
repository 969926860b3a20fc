"""One place of a model in memory with what is trained of it, made anew whenever it is loaded: a block, or the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lilliput.machine import memory
from lilliput.model.weights import Model
from lilliput.training.optimizers import Leaf
from lilliput.training.student import Student
from lilliput.training.whole import of_cores
from lilliput.verbs.train import TrainOptions
from lilliput.verbs.trained import Trained


@dataclass(frozen=True)
class Held:
    """What is trained of a place: `cores` of its linears, and all `leaves`."""

    cores: Mapping[str, Trained]
    leaves: tuple[Leaf, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes, by name: leaves, and what methods keep beside them."""
        found = {f"value.{x.name}": x.value.detach() for x in self.leaves}
        for linear, core in self.cores.items():
            found |= {f"core.{linear}.{name}": x for name, x in core.state().items()}
        return found


@dataclass(frozen=True)
class Places:
    """The blocks of a model by number, and after them the final norm with the head, by the number of blocks.

    build: what is trained of the linears of a block, by name, as it is before the training.
    """

    model: Model
    student: Student
    build: Callable[[int], Mapping[str, Trained]]
    o: TrainOptions

    @property
    def head(self) -> int:
        return len(self.model.skeleton.block_names)

    def names(self, place: int) -> tuple[str, ...]:
        """The tensors that a place needs."""
        skeleton = self.model.skeleton
        if place < self.head:
            return skeleton.names_of(place)
        stem = skeleton.head.rpartition(".")[0]
        return tuple(dict.fromkeys((*skeleton.final, *(n for n in skeleton.shapes if n.rpartition(".")[0] == stem))))

    @contextmanager
    def resident(self, place: int) -> Iterator[Held]:
        """A place in memory while the context lasts, and nothing of it afterwards."""
        skeleton = self.model.skeleton
        cores = dict(self.build(place)) if place < self.head else {}
        names = [n for n in self.names(place) if n.removesuffix(".weight") not in cores]
        self.model.load(names)
        plain: dict[str, nn.Module] = {}
        leaves = of_cores(cores, self.o)
        for name in names:
            value = skeleton.tensor(name)
            if isinstance(value, nn.Parameter) and self.o.trains(name):
                leaves.append(Leaf(name, value.requires_grad_()))
        try:
            for name, core in cores.items():
                plain[name] = skeleton.model.get_submodule(name)
                self.student.place(name, core)
            yield Held(cores, tuple(leaves))
        finally:
            for name, module in plain.items():
                parent, _, own = name.rpartition(".")
                skeleton.model.get_submodule(parent)._modules[own] = module
            skeleton.unload(names)
            cores.clear()
            leaves.clear()
            memory.trim()
