"""A model that is trained block by block: the steps of the whole model, states to go on from, one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
from lilliput.data.documents import Document, pack
from lilliput.data.lessons import Lessons, whole
from lilliput.errors import DataError, LilliputError
from lilliput.methods.train import gmp, lottery_ticket, movement, platon
from lilliput.methods.train.full import Full
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.training import loop
from lilliput.training.loop import Curve
from lilliput.training.streamed import Streamed
from lilliput.training.student import Student
from lilliput.training.text import Text
from lilliput.training.whole import Whole
from lilliput.verbs.objective import TokenIO
from lilliput.verbs.train import TrainOptions
from lilliput.verbs.trained import Trained

Begin = Callable[[Layer], Trained]
QUICK = TrainOptions(steps=5, batch=3, lr=0.01, save=2, clip=0.5)


def cross_entropy(io: TokenIO) -> Tensor:
    return torch.nn.functional.cross_entropy(io.logits, io.labels, reduction="none")


class Pair:
    """A model whose linears are trained, whole and streamed."""

    def __init__(self, folder: Path, lessons: Lessons, begin: Begin = Full) -> None:
        self.folder, self.lessons, self.begin = folder, lessons, begin

    def cores(self, model: Any, number: int) -> dict[str, Trained]:
        prefix, block = model.skeleton.block_names[number], model.anatomy().blocks[number]
        found = {}
        for x in (x for x in block.linears if x.role != "router"):
            weight = model.read(f"{prefix}.{x.name}.weight")
            found[f"{prefix}.{x.name}"] = self.begin(Layer(f"{prefix}.{x.name}", weight.T if x.transposed else weight))
        return found

    def whole(self, o: TrainOptions, place: Any) -> Whole:
        model = open_model(self.folder)
        cores = {n: c for i in range(len(model.skeleton.block_names)) for n, c in self.cores(model, i).items()}
        model.load(x for x in model.skeleton.shapes if x.removesuffix(".weight") not in cores)
        student = Student(model.skeleton, cross_entropy, checkpointing=True)
        for name, core in cores.items():
            student.place(name, core)
        return Whole(student, Text(self.lessons), o, place)

    def streamed(self, o: TrainOptions, place: Any) -> Streamed:
        model = open_model(self.folder)
        return Streamed(model, lambda n: self.cores(model, n), cross_entropy, Text(self.lessons), o, place)

    def train(self, trainer: Any, o: TrainOptions) -> Curve:
        return loop.train(trainer, self.lessons, o, Quiet())


def written(trainer: Any) -> dict[str, Tensor]:
    """What is trained."""
    return {n: x.decode() if isinstance(x, Layer) else x.clone() for n, x in trainer.results()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


@pytest.fixture
def places(small: Any, tmp_path: Path) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        return small.memory(tmp_path / name)

    return make


BEGINS: dict[str, Begin] = {
    "full": Full,
    "platon": lambda x: _counted(platon.begin(x, x.weight, platon.Options(steps=5, sparse_from=0.0))),
    "ticket": lambda x: _counted(lottery_ticket.begin(x, x.weight, lottery_ticket.Options(steps=5, rounds=2))),
    "soft movement": lambda x: _counted(movement.begin(x, x.weight, movement.Options(steps=5, kind="soft"))),
    "regrowing": lambda x: _counted(
        gmp.begin(x, x.weight, gmp.Options(steps=5, every=1, through=True, regrow=0.01, penalty="l2"))
    ),
}


def _counted(core: Trained) -> Trained:
    core.planned(300, None)
    return core


@pytest.mark.parametrize("name", BEGINS)
def test_it_steps_as_the_whole_model(small: Any, places: Callable[[str], Any], name: str) -> None:
    pair = Pair(small.model, small.lessons, BEGINS[name])
    o = QUICK.model_copy(update={"at_once": 2, "others": ("*norm*",), "weight_decay": 0.1})
    one, two = pair.whole(o, places("whole")), pair.streamed(o, places("streamed"))
    first, second = pair.train(one, o), pair.train(two, o)
    assert second.losses == pytest.approx(first.losses, abs=1e-4)
    assert first.losses[-1] != pytest.approx(first.losses[0], abs=0.01)
    same(written(one), written(two), 1e-4)
    assert "model.norm.weight" in written(two)
    assert one.judge([0, 4]) == pytest.approx(two.judge([0, 4]), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "mixtral", "neox"])
def test_relatives_step_as_whole_models(tiny: Callable[[str], Path], places: Callable[[str], Any], name: str) -> None:
    """Tied heads, biases that are trained too, weights that are stored as [in, out], experts, blocks side by side."""
    generator = torch.Generator().manual_seed(0)
    pair = Pair(tiny(name), whole(torch.randint(512, (4, 10), generator=generator), "rows"))
    o = QUICK.model_copy(update={"others": ("*.bias", "*ln_f*"), "steps": 3, "lr": 0.001})
    one, two = pair.whole(o, places("whole")), pair.streamed(o, places("streamed"))
    assert pair.train(two, o).losses == pytest.approx(pair.train(one, o).losses, abs=1e-4)
    same(written(one), written(two), 1e-4)


@pytest.mark.parametrize("after", [1, 3])
def test_a_training_that_was_cut_off_goes_on_as_if_nothing_had_been(
    small: Any, places: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    pair = Pair(small.model, small.lessons, BEGINS["platon"])
    o = QUICK.model_copy(update={"held_out": 0.3})
    unbroken = pair.streamed(o, places("unbroken"))
    curve = pair.train(unbroken, o)
    plain, place = Streamed._descend, places("cut")

    def cut(self: Streamed, number: int, now: loop.Now, factor: float) -> None:
        if now.step == after and number == 1:
            raise RuntimeError("killed")
        plain(self, number, now, factor)

    monkeypatch.setattr(Streamed, "_descend", cut)
    with pytest.raises(RuntimeError, match="killed"):
        pair.train(pair.streamed(o, place), o)
    monkeypatch.setattr(Streamed, "_descend", plain)
    again = pair.streamed(o, place)
    found = pair.train(again, o)
    assert (found.losses, found.held_out) == (curve.losses, curve.held_out)
    same(written(again), written(unbroken))


def test_one_block_is_in_memory(small: Any, places: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(small.model, small.lessons)
    trainer = pair.streamed(QUICK, places("one"))
    skeleton = trainer._model.skeleton
    plain, most = Skeleton.run, 0
    seen: list[int] = []

    def run(self: Skeleton, i: int, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal most
        loaded = [n for n in skeleton.shapes if not skeleton.tensor(n).is_meta]
        held = [n for n, x in skeleton.model.named_parameters() if not x.is_meta]
        assert all(n.startswith(f"{skeleton.block_names[i]}.") for n in (*loaded, *held))
        most = max(most, sum(x.numel() for _, x in skeleton.model.named_parameters() if not x.is_meta))
        seen.append(i)
        return plain(self, i, *args, **kwargs)

    monkeypatch.setattr(Skeleton, "run", run)
    trainer.step([0, 1, 2], loop.Now(0, 0))
    assert seen == [0] * 3 + [1] * 3 + [2] * 3 + [2] * 3 + [1] * 3 + [0] * 3
    assert most == sum(skeleton.tensor(n).numel() for n in skeleton.names_of(0))
    assert all(x.is_meta for x in skeleton.model.parameters())
    assert not list(trainer._own.glob("states-*"))


def test_what_loses_least_is_taken_back(small: Any, places: Callable[[str], Any]) -> None:
    pair = Pair(small.model, small.lessons)
    o = QUICK.model_copy(update={"held_out": 0.34, "lr": 0.3, "schedule": "constant", "save": 1, "clip": None})
    trainer = pair.streamed(o, places("one"))
    curve = pair.train(trainer, o)
    assert trainer.judge(loop.held_out(6, o)) == pytest.approx(min(x for _, x in curve.held_out), abs=1e-6)


def test_a_loss_that_is_no_number_leaves_what_is_trained(small: Any, places: Callable[[str], Any]) -> None:
    pair = Pair(small.model, small.lessons)
    trainer = pair.streamed(QUICK, places("one"))
    before = written(trainer)
    trainer._student._loss = lambda io: cross_entropy(io) * float("nan")
    with pytest.raises(LilliputError, match="the loss is nan at step 1"):
        pair.train(trainer, QUICK)
    same(written(trainer), before)


def test_rows_of_several_documents_are_refused(small: Any, places: Callable[[str], Any]) -> None:
    documents = [Document(row[:5].tolist(), [True] * 5) for row in small.lessons.ids]
    packed = pack(documents, rows=2, tokens=12, filler=0)
    pair = Pair(small.model, Lessons.of(packed.ids, packed.counts, packed.positions, "packed"))
    with pytest.raises(DataError, match=r"several documents .* `driver` to whole"):
        pair.streamed(QUICK, places("one"))
