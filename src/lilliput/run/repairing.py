"""How the verb `repair` is carried out: the unedited model runs beside the edited one, a block of each in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lilliput.anatomy.model import Linear
from lilliput.model.block import BlockWeights
from lilliput.model.edited import EditedModel, unedited
from lilliput.model.weights import Model
from lilliput.parts.layer import Layer
from lilliput.run.running import runner
from lilliput.streaming.collect import collect
from lilliput.streaming.forward import Batches, embed, through
from lilliput.streaming.states import Activations
from lilliput.streaming.walk import Flow, resident
from lilliput.verbs.repair import Consumer, Repair, RepairIO
from lilliput.verbs.spec import Task
from lilliput.verbs.view import FitBlock, FitIO

TEACHER = "teacher.bin"


class Teacher:
    """The unedited model on the samples of a run: its hidden states, in a file, after the blocks that were passed."""

    def __init__(self, model: Model, batches: Batches, states: Activations) -> None:
        self.model, self._batches, self.states = model, batches, states
        self._passed = 0

    def advance(self, until: int) -> None:
        """Go on until block `until` is next."""
        skeleton = self.model.skeleton
        for block in resident(self.model, blocks=range(self._passed, until)):
            for run in through(skeleton, block, self._batches, self.states, self.states):
                run()
        self._passed = max(self._passed, until)

    def grams(
        self, block: int, sites: frozenset[str], inputs: Activations
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Gram matrices of what enters some sites of a block for these inputs of it, of each half of the samples."""
        skeleton = self.model.skeleton
        chosen = [x for x in self.model.anatomy().blocks[block].sites if x.name in sites]
        self.model.load_block(block)
        try:
            passes = through(skeleton, block, self._batches, inputs, None)
            needs = {x.name: frozenset({"gram"}) for x in chosen}
            first = sum(_half(a, len(inputs)) == 0 for a, _ in self._batches.bounds)
            halves = [collect(skeleton, block, chosen, needs, x) for x in (passes[:first], passes[first:])]
        finally:
            self.model.unload_block(block)
        one, two = ({name: x.need("gram") for name, x in stats.items()} for stats in halves)
        return one, two


def _half(sample: int, count: int) -> int:
    """The half of the samples that one belongs to."""
    return int(2 * sample >= count)


def _bounds(count: int, batch: int) -> list[tuple[int, int]]:
    """Batches that lie within one half each."""
    middle = (count + 1) // 2
    starts = [(a, middle) for a in range(0, middle, batch)] + [(a, count) for a in range(middle, count, batch)]
    return [(a, min(a + batch, end)) for a, end in starts]


@contextmanager
def teacher(model: Model, flow: Flow) -> Iterator[Teacher]:
    """The unedited model before its first block; its file goes when the context ends."""
    base = unedited(model)
    shape = (len(flow.ids), flow.ids.shape[1], base.skeleton.hidden_size)
    states = Activations(flow.folder / TEACHER, shape, flow.dtype, create=True)
    try:
        recorded = embed(base, flow.ids, flow.batch, states)
        bounds = _bounds(len(flow.ids), flow.batch)
        calls = dict(recorded.calls)
        for count in {b - a for a, b in bounds} - calls.keys():
            calls[count] = base.skeleton.calls(count, flow.ids.shape[1])
        yield Teacher(base, Batches(tuple(bounds), calls), states)
    finally:
        states.delete()


def base_block(model: Model, block: int) -> int:
    """The number of a block in the unedited model."""
    return base_block(model.base, model.base_block(block)) if isinstance(model, EditedModel) else block


def base_name(model: Model, canonical: str) -> str | None:
    """The name that a tensor has in the unedited model; None where it averages several of them."""
    if not isinstance(model, EditedModel):
        return canonical
    return None if model.averaged(canonical) else base_name(model.base, model.base_name(canonical))


def _columns(model: Model, name: str, axis: int) -> Tensor | None:
    """Of an edited tensor, the indices along an axis in the unedited one; None where all are there."""
    if not isinstance(model, EditedModel):
        return None
    own = model.kept(name, axis)
    below = _columns(model.base, model.base_name(name), axis)
    if own is None or below is None:
        return below if own is None else own
    return below[own]


def repaired(
    task: Task, model: Model, weights: BlockWeights, index: int, batches: Batches, inputs: Activations, tutor: Teacher
) -> Mapping[str, Tensor]:
    """What the step makes of the linears of a loaded block, [out, in] by name."""
    skeleton, anatomy = model.skeleton, weights.anatomy
    last = index + 1 == len(skeleton.block_names)
    mine = base_block(model, index)
    tutor.advance(len(tutor.model.skeleton.block_names) if last else base_block(model, index + 1))
    run = runner(model, index, anatomy, batches)
    piece = max(b - a for a, b in batches.bounds)
    device = weights.device

    def consumers() -> Mapping[str, Consumer]:
        """An average of experts is nothing that the unedited model has: what it reads is not fitted."""
        whole = BlockWeights(tutor.model, mine, tutor.model.anatomy().blocks[mine])
        cut: dict[str, tuple[Linear, Tensor]] = {}
        for linear in anatomy.linears:
            tensor = f"{weights.prefix}.{linear.name}.weight"
            kept, old = _columns(model, tensor, int(not linear.transposed)), base_name(model, tensor)
            if kept is not None and old is not None:
                name = old.removeprefix(f"{whole.prefix}.").removesuffix(".weight")
                cut[linear.name] = whole.anatomy.linear(name), kept
        one, two = tutor.grams(mine, frozenset(x.site for x, _ in cut.values()), inputs) if cut else ({}, {})
        return {
            name: Consumer(
                whole.linear(x).to(device),
                (one[x.site].to(device), two[x.site].to(device)),
                kept.to(device),
            )
            for name, (x, kept) in cut.items()
        }

    def passes(name: str, values: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        entered: list[Tensor] = []
        module = skeleton.block(index).get_submodule(name)
        hook = module.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach().float()))
        try:
            for a, b in _bounds(len(inputs), piece):
                entered.clear()
                with torch.no_grad():
                    out = run(values, inputs.read(a, b).to(device))
                entering, wanted = entered[0].view(*out.shape[:2], -1), tutor.states.read(a, b).to(device).float()
                yield _half(a, len(inputs)), entering, out, wanted
        finally:
            hook.remove()

    layers = {x.name: Layer(x.name, weights.linear(x).to(device)) for x in anatomy.linears}
    io = RepairIO(FitIO({}, inputs, tutor.states, piece), consumers, passes)
    with torch.enable_grad():
        changed = task.of(Repair).run(FitBlock(anatomy, layers, run), io, task.options)
    return {name: value.detach() for name, value in changed.items()}
