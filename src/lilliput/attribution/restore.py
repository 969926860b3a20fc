"""What the final divergence would be if one block, or one linear, were the original's: by running it so.

The compressed model runs once; for each thing to restore, a second stream of hidden states branches off where that
thing lies, passes through it in its original form, and continues through the compressed blocks after it. All streams
advance together, so that every block is loaded once. The share that a restoration gives back, 1 - KL(restored) / KL, is
exact for the text at hand; shares do not add up to 1, since errors amplify and cancel each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lilliput.metrics.logits import StreamedHead, score
from lilliput.metrics.slices import choose
from lilliput.model.weights import Model
from lilliput.progress import Progress
from lilliput.runtime import inputs as rounding
from lilliput.streaming.forward import Batches, embed, finish, through
from lilliput.streaming.states import Activations
from lilliput.streaming.walk import resident

Swap = Mapping[str, Callable[[], Tensor]]  # by linear of a block: makes the weight [out, in] to put there


@dataclass
class OutputLoss:
    """Energies summed over tokens: of the original's outputs, and of the difference of the compressed block's."""

    whole: float = 0.0
    difference: float = 0.0

    @property
    def error(self) -> float:
        """Relative error of the outputs."""
        return (max(self.difference, 0.0) / self.whole) ** 0.5 if self.whole > 0 else 0.0


@dataclass
class Restored:
    """total: KL(original || compressed), nats per token; blocks: by restored block, the KL that is left; linears: the
    same by name; everywhere: the KL with all those weights put in; block_outputs: each compressed block on the
    original's own inputs; linear_outputs: likewise of each linear, by name; drift: how far the compressed stream is
    from the original's after each block."""

    total: float = 0.0
    blocks: dict[int, float] = field(default_factory=dict)
    linears: dict[str, float] = field(default_factory=dict)
    everywhere: float | None = None
    block_outputs: list[OutputLoss] = field(default_factory=list)
    linear_outputs: dict[str, OutputLoss] = field(default_factory=dict)
    drift: list[OutputLoss] = field(default_factory=list)


def restore(
    model: Model,
    against: Model,
    ids: Tensor,
    folder: Path,
    *,
    blocks: Sequence[int] = (),
    linears: Mapping[int, Swap] | None = None,
    everywhere: Mapping[int, Swap] | None = None,
    outputs: bool = False,
    batch: int = 2,
    memory_bytes: int | None = None,
    progress: Progress | None = None,
) -> Restored:
    """Run ids int64 [N, T] through both models with the streams asked for.

    `blocks`: which to restore; `linears`: by block and name relative to it, the weight [out, in] to restore, already in
    the compressed model's coordinates; `everywhere`: one stream with all of these weights put in; `outputs`: also
    measure the outputs of blocks and linears. Two blocks are resident, and one file of hidden states for each stream
    lies in `folder`.
    """
    swaps = linears or {}
    result = Restored()
    with ExitStack() as stack, torch.no_grad():
        streams: dict[str, Activations] = {}  # all but the original's

        def new(name: str) -> Activations:
            shape = (len(ids), ids.shape[1], against.skeleton.hidden_size)
            states = Activations(folder / f"stream-{name}.bin", shape, torch.float32, create=True)
            stack.callback(states.delete)
            return states

        def branch(name: str) -> Activations:
            streams[name] = new(str(len(streams)))
            return streams[name]

        base, ours = new("original"), branch("compressed")
        base_batches, batches = embed(against, ids, batch, base), embed(model, ids, batch, ours)
        if everywhere is not None:
            embed(model, ids, batch, branch("everywhere"))
        count = len(model.skeleton.block_names)
        for index in resident(model, against):
            fresh: list[str] = []
            if index in blocks:
                fresh.append(f"block {index}")
                for run in through(against.skeleton, index, base_batches, ours, branch(fresh[-1])):
                    run()
            for name, weight in swaps.get(index, {}).items():
                fresh.append(f"{model.skeleton.block_names[index]}.{name}")
                _swapped(model, index, {name: weight}, batches, ours, branch(fresh[-1]))
            if everywhere is not None:
                fresh.append("everywhere")
                changed = streams["everywhere"]
                _swapped(model, index, everywhere.get(index, {}), batches, changed, changed)
            for name, states in streams.items():
                if name not in fresh:
                    for run in through(model.skeleton, index, batches, states, states):
                        run()
            if outputs:
                _outputs(model, against, index, base, base_batches, batches, result)
                result.drift.append(_distance(ours, base))
            else:
                for run in through(against.skeleton, index, base_batches, base, base):
                    run()
            if progress is not None:
                progress.step(index + 1, count, "finding what was lost")
        divergences = _divergences(model, against, ids, base, streams, memory_bytes)
    result.total = divergences.pop("compressed")
    result.everywhere = divergences.pop("everywhere", None)
    for name, value in divergences.items():
        number = name.removeprefix("block ")
        if number != name:
            result.blocks[int(number)] = value
        else:
            result.linears[name] = value
    return result


def _swapped(
    model: Model, index: int, weights: Swap, batches: Batches, inputs: Activations, outputs: Activations
) -> None:
    """Run a block with some weights put in for its own."""
    skeleton = model.skeleton
    names = {name: f"{skeleton.block_names[index]}.{name}.weight" for name in weights}
    originals = {tensor: skeleton.tensor(tensor) for tensor in names.values()}
    block = skeleton.block(index)
    rounded = {name: found for name in weights if (found := rounding.of(block.get_submodule(name))) is not None}
    for name, make in weights.items():
        skeleton.load({names[name]: make().to(originals[names[name]].dtype)})
        rounding.detach(block.get_submodule(name))  # what is put in has its inputs as they are
    for run in through(skeleton, index, batches, inputs, outputs):
        run()
    skeleton.load(originals)
    for name, how in rounded.items():
        rounding.attach(block.get_submodule(name), how)


def _outputs(
    model: Model,
    against: Model,
    index: int,
    states: Activations,
    base_batches: Batches,
    batches: Batches,
    result: Restored,
) -> None:
    """Outputs of block `index` and of its linears, both models on the original's hidden states, batch by batch.

    `states`: the original's stream, which goes on through its own block.
    """
    block = against.anatomy().blocks[index]
    prefix = against.skeleton.block_names[index]
    whole = OutputLoss()
    for start, stop in base_batches.bounds:
        captured: list[dict[str, Tensor]] = []
        hidden = states.read(start, stop)
        ends = []
        for side, calls in ((against, base_batches), (model, batches)):
            outs: dict[str, Tensor] = {}
            with ExitStack() as stack:
                for linear in block.linears:
                    module: nn.Module = side.skeleton.block(index).get_submodule(linear.name)
                    stack.callback(module.register_forward_hook(_keep(outs, linear.name)).remove)
                ends.append(side.skeleton.run(index, hidden.to(side.skeleton.device), calls.calls[stop - start]))
            captured.append(outs)
        states.write(start, ends[0])
        start_at = hidden.to(ends[0].device).float()
        _add(whole, ends[1].float() - start_at, ends[0].float() - start_at)
        for name, theirs in captured[0].items():
            if name in captured[1] and captured[1][name].shape == theirs.shape:
                _add(result.linear_outputs.setdefault(f"{prefix}.{name}", OutputLoss()), captured[1][name], theirs)
    result.block_outputs.append(whole)


def _keep(outs: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        outs[name] = output.detach().float()

    return hook


def _add(loss: OutputLoss, ours: Tensor, theirs: Tensor) -> None:
    loss.whole += float(theirs.double().square().sum())
    loss.difference += float((ours - theirs).double().square().sum())


def _distance(ours: Activations, base: Activations) -> OutputLoss:
    loss = OutputLoss()
    for i in range(len(base)):
        _add(loss, ours.read(i, i + 1).float(), base.read(i, i + 1).float())
    return loss


def _divergences(
    model: Model,
    against: Model,
    ids: Tensor,
    original: Activations,
    streams: Mapping[str, Activations],
    budget: int | None,
) -> dict[str, float]:
    """Mean KL of the original to every stream, nats per token."""
    finish(against, original)
    finish(model, *streams.values())
    shape = choose([model, against], ids.shape[1], budget, len(ids))
    scores = score(
        ids,
        StreamedHead(model, *streams.values()),
        StreamedHead(against, original),
        columns=shape.columns,
        tile=shape.tile,
        streams=len(streams),
    )
    if scores.divergence is None:
        raise RuntimeError("a reference was given, but no divergence came back")
    parts = scores.divergence.view(len(streams), -1)
    return {name: float(part.mean()) for name, part in zip(streams, parts, strict=True)}
