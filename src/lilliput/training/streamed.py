"""A model larger than the memory: gradients and steps of the optimizer with one block of it resident.

A step goes through the blocks three times. On the way there each block is loaded, run, and freed; what enters it stays
in a file. On the way back it is loaded again, run from there with gradients, whose slope by its inputs goes on to the
block before, while those of what is trained go to a file: how far they are held back is known when all have arrived.
Then each block is loaded once more, and stepped. What is trained and its moments lie in files meanwhile, in float32.

With hidden states h_i, L = loss(head(h_n)), h_i+1 = f_i(h_i; w_i):  dL/dw_i = (dh_i+1/dw_i)^T dL/dh_i+1,
dL/dh_i = (dh_i+1/dh_i)^T dL/dh_i+1; the numbers are those of the whole model, up to the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lilliput.data.lessons import Lessons
from lilliput.errors import DataError
from lilliput.machine import ranks
from lilliput.model.weights import Model
from lilliput.parts.layer import Layer
from lilliput.streaming.forward import Batches, embed, through
from lilliput.streaming.states import Activations
from lilliput.training import loop
from lilliput.training.loop import NotFiniteError
from lilliput.training.moments import OnDisk
from lilliput.training.optimizers import norm, summed, update
from lilliput.training.pages import Pages
from lilliput.training.resident import Held, Places
from lilliput.training.student import Student, penalties
from lilliput.training.text import Rows, Text
from lilliput.training.whole import Place, below
from lilliput.verbs.objective import TokenIO
from lilliput.verbs.train import TrainOptions
from lilliput.verbs.trained import Trained

BEST = "best"


def refuse(lessons: Lessons) -> None:
    """Raises DataError for rows that hold several documents, which blocks by themselves are not told of."""
    if lessons.positions is not None:
        raise DataError(
            "rows that hold several documents are trained with the whole model in memory alone: set the step's option "
            "`documents` to false, give text in one piece, or set `driver` to whole"
        )


class Streamed:
    """A `loop.Trainer`. build: see `Places`; loss: of n tokens, [n]. Raises DataError for rows of several documents."""

    def __init__(
        self,
        model: Model,
        build: Callable[[int], Mapping[str, Trained]],
        loss: Callable[[TokenIO], Tensor],
        text: Text,
        o: TrainOptions,
        place: Place,
    ) -> None:
        refuse(text.lessons)
        self._student = Student(model.skeleton, loss)
        self._model, self._text, self._o, self._place = model, text, o, place
        self._places = Places(model, self._student, build, o)
        self._own = place.folder if ranks.size() == 1 else place.folder / f"rank-{ranks.rank()}"
        self._own.mkdir(exist_ok=True)
        self._begin()

    def _begin(self) -> None:
        """Lay out the files, and write what is trained as it is before the training."""
        likes: dict[str, Tensor] = {}
        trained: list[str] = []
        self._names: list[tuple[str, ...]] = []
        for place in range(self._places.head + 1):
            with self._places.resident(place) as held:
                likes |= {name: x.to("meta") for name, x in held.tensors().items()}
                self._names.append(tuple(x.name for x in held.leaves))
                trained += self._names[-1]
        values = {name: likes[f"value.{name}"] for name in trained}
        self._values = Pages(likes, self._own, "values")
        self._slopes = Pages(values, self._own, "slopes")
        self._moments = OnDisk(values, self._own)
        self._number = {name: n for n, name in enumerate(trained)}
        self._counts = [0] * len(trained)
        self._moved: set[str] = set()  # leaves that a step's loss depends on
        for place in self._trained():
            with self._places.resident(place) as held:
                self._write(held)

    def _trained(self) -> list[int]:
        """The places of which something is trained."""
        return [place for place, names in enumerate(self._names) if names]

    def _write(self, held: Held) -> None:
        for name, value in held.tensors().items():
            self._values.write(name, value)

    @contextmanager
    def _resident(self, place: int, now: loop.Now | None = None) -> Iterator[Held]:
        """A place as it is trained so far, at the beginning of a step where one is named."""
        with self._places.resident(place) as held:
            with torch.no_grad():
                for name, value in held.tensors().items():
                    value.copy_(self._values.read(name))
            if now is not None:
                # What is drawn is the same each time that the step comes by.
                torch.manual_seed((self._o.seed * 1_000_003 + now.step) * 4_099 + place)
                for core in held.cores.values():
                    core.step(now.place / max(self._o.steps, 1))
            yield held

    @contextmanager
    def _states(self, rows: int, tokens: int, *, keep: bool) -> Iterator[list[Activations]]:
        """Files for the hidden states that enter each place; not `keep`: one file for all."""
        shape, dtype = (rows, tokens, self._model.skeleton.hidden_size), self._model.skeleton.dtype
        count = self._places.head + 1
        with ExitStack() as stack:
            made = []
            for n in range(count if keep else 1):
                made.append(Activations(self._own / f"states-{n:04d}.bin", shape, dtype, create=True))
                stack.callback(made[-1].delete)
            yield made if keep else made * count

    def _forward(self, rows: Rows, states: Sequence[Activations], now: loop.Now | None) -> Batches:
        skeleton = self._model.skeleton
        with torch.no_grad():
            batches = embed(self._model, rows.ids, self._o.at_once or 1, states[0])
            for block in range(self._places.head):
                with self._resident(block, now), self._student.still():
                    for run in through(skeleton, block, batches, states[block], states[block + 1]):
                        run()
        return batches

    def step(self, samples: Sequence[int], now: loop.Now) -> float:
        rows = self._text.rows(list(samples)[ranks.share(len(samples))])
        whole = int(ranks.add(torch.tensor(rows.tokens)))
        self._moved.clear()
        with self._states(len(rows.ids), rows.ids.shape[1], keep=True) as states:
            batches = self._forward(rows, states, now)
            slope = Activations(self._own / "slope.bin", states[0].shape, torch.float32, create=True)
            try:
                total, square = self._head(rows, batches, states[-1], slope, whole, now)
                for block in reversed(range(self._places.head)):
                    square += self._back(block, batches, states[block], slope, now)
            finally:
                slope.delete()
        size = math.sqrt(square)
        if not (math.isfinite(total) and math.isfinite(size)):
            what = f"the loss is {total}" if not math.isfinite(total) else f"the gradient's norm is {size}"
            raise NotFiniteError(what)
        clip = self._o.clip
        factor = clip / size if clip is not None and size > clip else 1.0
        for place in self._trained():
            self._descend(place, now, factor)
        return total

    def _head(
        self, rows: Rows, batches: Batches, inputs: Activations, slope: Activations, whole: int, now: loop.Now
    ) -> tuple[float, float]:
        """The loss of all processes' rows, and the sum of the squared gradients; the slope by `inputs` goes to a
        file."""
        skeleton, total = self._model.skeleton, 0.0
        with self._resident(self._places.head, now) as held:
            texts = self._text.batches(rows, self._o.at_once or 1)
            for (a, b), batch in zip(batches.bounds, texts, strict=True):
                hidden = inputs.read(a, b).to(skeleton.device).requires_grad_()
                loss = self._student.tokens(batch, skeleton.finish(hidden)) / whole
                total += float(loss.detach())
                torch.autograd.backward(loss)
                slope.write(a, _slope(hidden))
            square = self._arrived(held)
        return float(ranks.add(torch.tensor(total, dtype=torch.float64))), square

    def _back(self, block: int, batches: Batches, inputs: Activations, slope: Activations, now: loop.Now) -> float:
        """The sum of the squared gradients; the slope by the block's outputs becomes that by its inputs."""
        skeleton = self._model.skeleton
        with self._resident(block, now) as held:
            penalty = penalties(tuple(held.cores.values())) if ranks.lead() else None
            if penalty is not None:
                torch.autograd.backward(penalty)
            for a, b in batches.bounds:
                hidden = inputs.read(a, b).to(skeleton.device).requires_grad_()
                out = skeleton.run(block, hidden, batches.calls[b - a])
                torch.autograd.backward(out, slope.read(a, b).to(skeleton.device, out.dtype))
                slope.write(a, _slope(hidden))
            return self._arrived(held)

    def _arrived(self, held: Held) -> float:
        """Write the gradients of a place, summed over processes; the sum of their squares."""
        slopes = summed(held.leaves)
        for name, slope in slopes.items():
            self._slopes.write(name, slope)
        self._moved |= slopes.keys()
        return norm(slopes.values()) ** 2

    @torch.no_grad()
    def _descend(self, place: int, now: loop.Now, factor: float) -> None:
        rate = self._o.lr * loop.rate(now.place, self._o)
        with self._resident(place, now) as held:
            moved = [x for x in held.leaves if x.name in self._moved]
            for x in moved:
                x.value.grad = self._slopes.read(x.name).to(x.value.device).mul_(factor)
            for core in held.cores.values():
                core.after_backward()
            for x in moved:
                if x.value.grad is None:
                    continue
                n = self._number[x.name]
                self._counts[n] += 1
                first, second = (m.to(x.value.device) for m in self._moments.take(n))
                update(x.value, x.value.grad, first, second, self._counts[n], rate * x.factor, x.decay)
                x.value.grad = None
                self._moments.put(n, first, second)
            for core in held.cores.values():
                core.after_step(rate)
            self._write(held)

    @torch.no_grad()
    def judge(self, samples: Sequence[int]) -> float:
        rows, total = self._text.given(list(samples)[ranks.share(len(samples))]), 0.0
        skeleton = self._model.skeleton
        with self._states(len(rows.ids), rows.ids.shape[1], keep=False) as states:
            batches = self._forward(rows, states, None)
            with self._resident(self._places.head):
                texts = self._text.batches(rows, self._o.at_once or 1)
                for (a, b), batch in zip(batches.bounds, texts, strict=True):
                    finished = skeleton.finish(states[-1].read(a, b).to(skeleton.device))
                    total += float(self._student.tokens(batch, finished))
        whole = loop.counted(self._text.lessons, samples)
        return float(ranks.add(torch.tensor(total, dtype=torch.float64))) / whole

    def save(self, done: int, facts: Mapping[str, Tensor]) -> None:
        self._values.copy(str(done))
        state = {f"moment.{name}": x for name, x in self._moments.state(done).items()}
        state["counts"] = torch.tensor(self._counts)
        ranks.met()  # all copies are durable before the state that names them, and it before any older ones go
        if ranks.lead():
            self._place.save("state", {**state, **{f"fact.{name}": x for name, x in facts.items()}})
        ranks.met()
        self._settled(done)

    def _settled(self, done: int) -> None:
        self._values.forget(str(done), BEST)
        self._moments.settled(done)

    def restore(self) -> Mapping[str, Tensor] | None:
        saved = self._place.load("state")
        if saved is None:
            return None
        facts = below("fact.", saved)
        done = len(facts["losses"])
        self._values.go_back(str(done))
        self._moments.restore(below("moment.", saved), done)
        self._counts = [int(x) for x in saved["counts"]]
        self._settled(done)
        return facts

    def keep(self) -> None:
        self._values.copy(BEST)

    def take_back(self) -> None:
        self._values.go_back(BEST)

    def results(self) -> Iterator[tuple[str, Layer | Tensor]]:
        for place in self._trained():
            with self._resident(place) as held:
                for name, core in held.cores.items():
                    yield name, core.finish()
                own = {id(x) for core in held.cores.values() for x in core.parameters()}
                for x in held.leaves:
                    if id(x.value) not in own:
                        yield x.name, x.value.detach()

    def delete(self) -> None:
        """Remove what lies on disk, but for what `place` has saved."""
        self._values.delete()
        self._slopes.delete()
        self._moments.delete()


def _slope(hidden: Tensor) -> Tensor:
    if hidden.grad is None:
        raise RuntimeError("a block's output does not depend on its input")
    return hidden.grad
