"""The streamed backward pass: gradients of the language-model loss with one block resident, from the head down.

The forward pass leaves the input of every block on disk; going back, each block is loaded again, run with gradients
from its stored inputs, and freed. The embedding is not differentiated, so a tied head gets the head's share alone.
Cost: two forward passes and one backward pass, and for each block one file of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
from lilliput.machine import memory
from lilliput.progress import Progress
from lilliput.streaming.forward import Batches, through
from lilliput.streaming.states import Activations
from lilliput.streaming.walk import resident
from lilliput.streaming.watched import Watched

LOGITS = 1 << 22  # logits at a time, at least one token's

Read = Callable[[str], Tensor]
"""How a tensor, by canonical name, enters the computation."""


@dataclass(frozen=True)
class Samples:
    """Tokens for a method that runs the model itself: ids int64 [N, T]; `folder` takes what spills to disk."""

    ids: Tensor
    folder: Path
    progress: Progress | None = None


def tidy(folder: Path) -> None:
    """Delete the states that a killed pass has left in a folder."""
    for path in folder.glob("backward-*.bin"):
        path.unlink()


@dataclass(frozen=True)
class Gradients:
    """What one place of the model contributes: a block by its number, or the final norm and head under block None.

    loss: mean cross-entropy in nats of each token given those before it, over all samples. tensors: its gradient by
    canonical name, float32. squares: the sum over samples of the squared gradients of each sample's share of the loss
    (empty unless asked for). hidden: gradient with respect to the hidden states that enter the place [N, T, H]; valid
    until the next place is asked for.
    """

    block: int | None
    loss: float
    tensors: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    hidden: Activations


def loss(skeleton: Skeleton, read: Read, samples: Samples) -> float:
    """Mean cross-entropy in nats of each token given those before it; one block resident."""
    with _Streams(skeleton, samples, keep=False) as streams:
        _forward(skeleton, read, samples, streams)
        return _head(skeleton, read, samples, streams.inputs[-1], None, squares=False)[0]


@contextmanager
def reruns(skeleton: Skeleton, read: Read, samples: Samples) -> Iterator[Callable[[int, Read], Activations]]:
    """The last block's outputs for many sets of weights that differ little: a function of the first block that differs
    and of how tensors enter. Its result is valid until the next call.

    The states that enter every block are kept on disk while the context lasts, so that only the blocks from that one on
    run again. The number of blocks means that none differs.
    """
    with ExitStack() as stack, torch.no_grad():
        streams = stack.enter_context(_Streams(skeleton, samples, keep=True, gradient=False))
        _forward(skeleton, read, samples, streams)
        shape = streams.inputs[0].shape
        on_the_way = Activations(samples.folder / "backward-again.bin", shape, skeleton.dtype, create=True)
        stack.callback(on_the_way.delete)
        batches = _singly(skeleton, samples)

        def again(first: int, read: Read) -> Activations:
            inputs = streams.inputs[first]
            for block in resident(_Loader(skeleton, read), blocks=range(first, len(skeleton.block_names))):
                for run in through(skeleton, block, batches, inputs, on_the_way):
                    run()
                inputs = on_the_way
            return inputs

        yield again


@contextmanager
def losses(skeleton: Skeleton, read: Read, samples: Samples) -> Iterator[Callable[[int, Read], float]]:
    """`loss` for many weights that differ little, as `reruns` runs them; the head runs again too."""
    with reruns(skeleton, read, samples) as again:
        yield lambda first, read: _head(skeleton, read, samples, again(first, read), None, squares=False)[0]


def fisher(
    skeleton: Skeleton,
    read: Read,
    samples: Samples,
    names: Sequence[Collection[str]],
    *,
    done: Collection[int] = (),
) -> Iterator[tuple[int, Mapping[str, Tensor], Activations]]:
    """Squared gradients of single samples, from the last block down to block 0: (block, squares, gradient).

    For every tensor in `names`, by block: the sum over samples of (dL_n / dw)^2, float32 in the tensor's shape, with
    L_n the mean cross-entropy in nats of sample n. The gradient, in a file of `samples.folder` that stays until the
    next place is finished, is that of the hidden states that enter the block, of the summed cross-entropy.

    `done`: blocks that an interrupted pass has finished, down to the lowest of which the gradient lies in the folder;
    only the forward pass up to there is carried out again. An exception leaves that file, for the next attempt. Raises
    LilliputError where it is missing.
    """
    count = min(done, default=len(skeleton.block_names))
    shape = (samples.ids.shape[0], samples.ids.shape[1], skeleton.hidden_size)
    if count == 0:
        return
    with _Streams(skeleton, samples, keep=True, blocks=count, gradient=False) as streams:
        if done:
            streams.gradient = Activations(gradient_path(samples, count), shape, torch.float32, create=False)
        _forward(skeleton, read, samples, streams)
        if not done:
            streams.gradient = Activations(gradient_path(samples, count), shape, torch.float32, create=True)
            # A sum, not a mean: gradients of single tokens are large enough for 16 bits.
            _head(skeleton, read, samples, streams.inputs[count], streams.gradient, squares=False, weights=False)
        tokens = samples.ids.shape[1] - 1
        loader = _Loader(skeleton, read)
        for block in resident(loader, blocks=range(count - 1, -1, -1)):
            streams.inputs[block + 1].delete()
            before = streams.gradient
            after = Activations(gradient_path(samples, block), shape, torch.float32, create=True)
            squares = _squares(skeleton, block, streams, after, names[block])
            loader.unload_block(block)
            memory.trim()
            squares = {name: value.div_(tokens * tokens) for name, value in squares.items()}
            streams.gradient = after
            yield block, squares, after
            del squares  # not beside the squares of the block below
            before.delete()
        streams.gradient.delete()


def gradient_path(samples: Samples, block: int) -> Path:
    """Where `fisher` keeps the gradient of the hidden states that enter a block (of the head: the next number)."""
    return samples.folder / f"gradient-{block:04d}.bin"


def backward(
    skeleton: Skeleton,
    read: Read,
    samples: Samples,
    *,
    squares: bool = False,
    watch: Callable[[int], Watched | None] | None = None,
) -> Iterator[Gradients]:
    """Gradients of the loss, place by place from the head down to block 0.

    `read` gives every tensor as it enters the computation, so the loss may be that of changed weights; it is called
    twice for each tensor of a block. Samples go one at a time. `watch`: what looks at a loaded block meanwhile, if
    anything does. Close the iterator to leave early.
    """
    with _Streams(skeleton, samples, keep=True) as streams:
        _forward(skeleton, read, samples, streams)
        count = len(skeleton.block_names)
        value, tensors, second = _head(
            skeleton, read, samples, streams.inputs[count], streams.gradient, squares=squares
        )
        yield Gradients(None, value, tensors, second, streams.gradient)
        del tensors, second  # not beside those of the block below
        loader = _Loader(skeleton, read)
        for block in resident(loader, blocks=range(count - 1, -1, -1)):
            streams.inputs[block + 1].delete()
            watched = watch(block) if watch is not None else None
            tensors, second = _block(skeleton, block, streams, squares=squares, watched=watched)
            loader.unload_block(block)
            memory.trim()
            yield Gradients(block, value, tensors, second, streams.gradient)
            del tensors, second


class _Streams:
    """The files of one backward pass: the hidden states that enter each place, and the gradient on its way back."""

    def __init__(
        self, skeleton: Skeleton, samples: Samples, *, keep: bool, blocks: int | None = None, gradient: bool = True
    ) -> None:
        count = (len(skeleton.block_names) if blocks is None else blocks) + 1
        shape = (samples.ids.shape[0], samples.ids.shape[1], skeleton.hidden_size)
        self._made: list[Activations] = []
        if keep:
            paths = [samples.folder / f"backward-{i:04d}.bin" for i in range(count)]
            self.inputs = [self._make(path, shape, skeleton.dtype) for path in paths]
        else:
            self.inputs = [self._make(samples.folder / "backward-0000.bin", shape, skeleton.dtype)] * count
        # Gradients are small numbers of many sizes: they travel in float32 whatever the model computes in.
        last = samples.folder / "backward-gradient.bin"
        self.gradient = self._make(last, shape, torch.float32) if keep and gradient else self.inputs[0]

    def _make(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> Activations:
        try:
            store = Activations(path, shape, dtype, create=True)
        except OSError:
            self.delete()
            raise
        self._made.append(store)
        return store

    def delete(self) -> None:
        for store in self._made:
            store.delete()

    def __enter__(self) -> _Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.delete()


@dataclass(frozen=True)
class _Loader:
    """Blocks as `read` gives their tensors, see `walk.Loader`."""

    skeleton: Skeleton
    read: Read

    def load_block(self, i: int) -> None:
        _load(self.skeleton, self.read, self.skeleton.names_of(i))

    def unload_block(self, i: int) -> None:
        self.skeleton.unload(self.skeleton.names_of(i))


def _load(skeleton: Skeleton, read: Read, names: Iterable[str]) -> None:
    for name in names:
        skeleton.load({name: read(name)})


def _leaves(skeleton: Skeleton, names: Sequence[str]) -> dict[str, Tensor]:
    return {n: skeleton.tensor(n).requires_grad_() for n in names if skeleton.tensor(n).is_floating_point()}


def _forward(skeleton: Skeleton, read: Read, samples: Samples, streams: _Streams) -> None:
    with torch.no_grad():
        _load(skeleton, read, skeleton.embeddings)
        for n in range(len(samples.ids)):
            streams.inputs[0].write(n, skeleton.embed(samples.ids[n : n + 1])[0])
        skeleton.unload(skeleton.embeddings)
        batches = _singly(skeleton, samples)
        last = min(len(skeleton.block_names), len(streams.inputs) - 1)
        for block in resident(_Loader(skeleton, read), blocks=range(last)):
            for run in through(skeleton, block, batches, streams.inputs[block], streams.inputs[block + 1]):
                run()


def _singly(skeleton: Skeleton, samples: Samples) -> Batches:
    """One sample at a time."""
    count, length = samples.ids.shape
    return Batches(tuple((n, n + 1) for n in range(count)), {1: skeleton.calls(1, length)})


def _head(
    skeleton: Skeleton,
    read: Read,
    samples: Samples,
    inputs: Activations,
    gradient: Activations | None,
    *,
    squares: bool,
    weights: bool = True,
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """The loss; with a `gradient` to write to also the gradients of the final tensors and the head.

    Without `weights` only the gradient by the inputs is taken, of the summed loss instead of the mean.
    """
    stem = skeleton.head.rpartition(".")[0]
    names = tuple(dict.fromkeys((*skeleton.final, *(n for n in skeleton.shapes if n.rpartition(".")[0] == stem))))
    _load(skeleton, read, names)
    leaves = _leaves(skeleton, names) if gradient is not None and weights else {}
    head = {n: x for n, x in leaves.items() if n not in skeleton.final}
    sums = _Sums(leaves, squares)
    count = samples.ids.shape[0] * (samples.ids.shape[1] - 1) if weights else 1
    step = max(1, LOGITS // skeleton.shapes[skeleton.head][0])
    total = 0.0
    with torch.set_grad_enabled(gradient is not None):
        for n in range(len(samples.ids)):
            ids = samples.ids[n, 1:].to(skeleton.device)
            hidden = inputs.read(n, n + 1).to(skeleton.device).requires_grad_(gradient is not None)
            finished = skeleton.finish(hidden)
            into = torch.zeros_like(finished)
            for start in range(0, len(ids), step):
                part = finished.detach()[0, start : min(start + step, len(ids))].requires_grad_(gradient is not None)
                logits = skeleton.logits(part)
                part_loss = (
                    torch.nn.functional.cross_entropy(logits, ids[start : start + step], reduction="sum") / count
                )
                total += float(part_loss.detach())
                if gradient is not None:
                    gradients = torch.autograd.grad(part_loss, (part, *head.values()))
                    into[0, start : start + len(part)] = gradients[0]
                    sums.add(dict(zip(head, gradients[1:], strict=True)))
            if gradient is not None:
                final = {x: leaves[x] for x in leaves if x not in head}
                gradients = torch.autograd.grad(finished, (hidden, *final.values()), into)
                gradient.write(n, gradients[0])
                sums.add(dict(zip(final, gradients[1:], strict=True)))
                sums.close()
    skeleton.unload(names)
    memory.trim()
    return total, sums.total, sums.squares


def _block(
    skeleton: Skeleton, block: int, streams: _Streams, *, squares: bool, watched: Watched | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of a loaded block's tensors, and squares; that by its inputs takes the place of that by its outputs."""
    inputs = streams.inputs[block]
    leaves = _leaves(skeleton, skeleton.names_of(block))
    sums = _Sums(leaves, squares)
    calls = skeleton.calls(1, inputs.shape[1])
    with torch.enable_grad(), watched or nullcontext():
        for n in range(len(inputs)):
            hidden = inputs.read(n, n + 1).to(skeleton.device).requires_grad_()
            out = skeleton.run(block, hidden, calls)
            back = streams.gradient.read(n, n + 1).to(skeleton.device, out.dtype)
            # An expert that no token chose has no gradient.
            gradients = torch.autograd.grad(out, (hidden, *leaves.values()), back, allow_unused=True)
            streams.gradient.write(n, gradients[0])
            found = {name: g for name, g in zip(leaves, gradients[1:], strict=True) if g is not None}
            sums.add(found)
            sums.close()
            if watched is not None:
                watched.sample(found)
    return sums.total, sums.squares


def _squares(
    skeleton: Skeleton, block: int, streams: _Streams, after: Activations, names: Collection[str]
) -> dict[str, Tensor]:
    """Squared gradients of some tensors of a loaded block, summed over samples; that by its inputs goes to `after`."""
    whole = skeleton.names_of(block)
    inputs = streams.inputs[block]
    total = {n: torch.zeros(skeleton.shapes[n], device=skeleton.device) for n in whole if n in names}

    def add(name: str) -> Callable[[Tensor], None]:
        def run(leaf: Tensor) -> None:
            if leaf.grad is not None:
                slope = leaf.grad.float()
                total[name].addcmul_(slope, slope)
                leaf.grad = None  # one gradient at a time is enough

        return run

    for name, leaf in _leaves(skeleton, list(total)).items():
        leaf.register_post_accumulate_grad_hook(add(name))  # type: ignore[no-untyped-call]
    calls = skeleton.calls(1, inputs.shape[1])
    with torch.enable_grad():
        for n in range(len(inputs)):
            hidden = inputs.read(n, n + 1).to(skeleton.device).requires_grad_()
            out = skeleton.run(block, hidden, calls)
            torch.autograd.backward(out, streams.gradient.read(n, n + 1).to(skeleton.device, out.dtype))
            if hidden.grad is None:
                raise RuntimeError(f"block {block} does not depend on what enters it")
            after.write(n, hidden.grad)
    return total


class _Sums:
    """Gradients summed over samples, and their squares where asked for."""

    def __init__(self, leaves: Mapping[str, Tensor], squares: bool) -> None:
        def zeros() -> dict[str, Tensor]:
            return {n: torch.zeros_like(x, dtype=torch.float32, requires_grad=False) for n, x in leaves.items()}

        self.total = zeros()
        self.squares = zeros() if squares else {}
        self._sample: dict[str, Tensor] = {}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add to the sample at hand."""
        for name, value in gradients.items():
            self.total[name].add_(value)
            if self.squares:
                total = self._sample.get(name)
                self._sample[name] = value.float() if total is None else total + value

    def close(self) -> None:
        """The sample is complete."""
        for name, value in self._sample.items():
            self.squares[name].addcmul_(value, value)
        self._sample = {}
