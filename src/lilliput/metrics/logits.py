"""What the head says about every position, without ever holding the logits of more than a few rows.

The vocabulary is cut into slices, so that the head need not fit into memory; all positions pass through a slice before
the next one is loaded. Per position a handful of running float64 sums is enough: the maximum m and the scaled sum
Z = sum exp(l - m) of each model (log-sum-exp = m + log Z), the target's logit, the reference's best token, and

    A = sum_v exp(r_v - m_r) (r_v - l_v),    KL(reference || model) = A / Z_r - lse(r) + lse(l).

So one pass over both heads gives all metrics; the cost is the two matrix products and some eight sweeps over their
results, which come in tiles of a few megabytes. Each head is read once, whatever the number of windows and slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lilliput.errors import SourceError
from lilliput.machine.memory import trim
from lilliput.model.weights import TABLE_ROWS, Model
from lilliput.streaming.states import Activations

# A tile of logits, 8 MB in float32: wide and high enough for the matrix product, and small enough for the allocator to
# use the same memory again.
ROWS = 512
TILE = 4096


class Head(Protocol):
    """Logits of one model at positions of windows, for a slice of the vocabulary at a time."""

    @property
    def name(self) -> str: ...

    @property
    def vocabulary(self) -> int: ...

    def load(self, start: int, stop: int) -> None:
        """Make vocabulary entries [start, stop) the current slice."""
        ...

    def logits(self, window: int, start: int, stop: int, first: int, last: int) -> Tensor:
        """float32 [stop - start, last - first]: positions [start, stop) of a window, entries [first, last) of the
        vocabulary, which lie in the current slice. The caller may overwrite it."""
        ...

    def unload(self) -> None: ...


class StreamedHead:
    """The head of a model over hidden states that streams left in files of equal shape, already through the final norm.

    The windows of several files count through: those of the second follow upon those of the first.
    """

    def __init__(self, model: Model, *hidden: Activations) -> None:
        skeleton = model.skeleton
        self.name = model.source.model
        self.vocabulary = skeleton.shapes[skeleton.head][0]
        self._model = model
        self._hidden = hidden
        self._window = -1
        self._hidden_rows = torch.empty(0)
        self._slice: dict[str, Tensor] = {}
        self._first = 0
        module = skeleton.head_module
        self._kept: dict[str, nn.Parameter | None] = dict(module._parameters)
        self._names = _head_tensors(model)

    def load(self, start: int, stop: int) -> None:
        # In float32 whatever the blocks ran in: logits of size 20 in bfloat16 are off by up to 0.06, which is more than
        # careful quantization costs.
        for key, name in self._names.items():
            shape = (stop - start, *self._model.shape(name)[1:])
            self._slice[key] = torch.empty(shape, dtype=torch.float32, device=self._model.skeleton.device)
            for first, last in _spans(start, stop, TABLE_ROWS):
                self._slice[key][first - start : last - start] = self._model.read_rows(name, first, last)
        self._first = start

    def logits(self, window: int, start: int, stop: int, first: int, last: int) -> Tensor:
        skeleton = self._model.skeleton
        if window != self._window:
            stream, row = divmod(window, len(self._hidden[0]))
            rows = self._hidden[stream].read(row, row + 1)[0]
            self._hidden_rows = rows.to(skeleton.device, torch.float32)
            self._window = window
        for key, value in self._slice.items():
            # The head's own slot only: a tied embedding keeps its tensor.
            part = value[first - self._first : last - self._first]
            skeleton.head_module._parameters[key] = nn.Parameter(part, requires_grad=False)
        return skeleton.logits(self._hidden_rows[start:stop])

    def unload(self) -> None:
        self._model.skeleton.head_module._parameters.update(self._kept)
        self._slice = {}


def same_head(a: Model, b: Model) -> bool:
    """Whether two models make the same logits of the same hidden states: one configuration and one head, bit by bit."""
    if _configuration(a) != _configuration(b):
        return False
    names = zip(_head_tensors(a).values(), _head_tensors(b).values(), strict=True)
    return all(_same_tensor(a, b, x, y) for x, y in names)


def _configuration(model: Model) -> dict[str, Any]:
    ignored = {"quantization_config", "dtype", "_name_or_path", "transformers_version", "tie_word_embeddings"}
    return {k: v for k, v in model.source.text_config.to_dict().items() if k not in ignored}


def _head_tensors(model: Model) -> dict[str, str]:
    """The head module's parameters and the names that they have in the model."""
    module = model.skeleton.head_module
    names = {"weight": model.skeleton.head}
    if module._parameters.get("bias") is not None:
        path = next(path for path, x in model.skeleton.model.named_modules() if x is module)
        names["bias"] = f"{path}.bias"
    return names


def _same_tensor(a: Model, b: Model, name: str, other: str) -> bool:
    shape = a.shape(name)
    if shape != b.shape(other):
        return False
    spans = _spans(0, shape[0], ROWS)
    return all(torch.equal(a.read_rows(name, x, y), b.read_rows(other, x, y)) for x, y in spans)


@dataclass(frozen=True)
class Scores:
    """Per position, [windows, scored tokens]: nll in nats (float64) and the preferred token (int64), and against a
    reference its nll, its preferred token, the divergence KL(reference || model) in nats (float64), and whether both
    prefer the same token (bool)."""

    nll: Tensor
    choice: Tensor
    reference: Tensor | None = None
    reference_choice: Tensor | None = None
    divergence: Tensor | None = None
    same: Tensor | None = None

    def of(self, rows: slice, columns: slice) -> Scores:
        """The same for some windows and positions."""
        return Scores(*(None if x is None else x[rows, columns] for x in vars(self).values()))  # type: ignore[arg-type]

    def stream(self, number: int, windows: int) -> Scores:
        """Those of one of the streams that `score` went through, each of so many windows."""
        return self.of(slice(number * windows, (number + 1) * windows), slice(None))


class _Sums:
    """Running log-sum-exp and target logit of one model at `shape` positions."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.top = torch.full(shape, -torch.inf, dtype=torch.float64)
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.target = torch.zeros(shape, dtype=torch.float64)
        self.choice = torch.zeros(shape, dtype=torch.int64)

    def rise(self, at: tuple[int, slice], top: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Take over a slice's maxima and the tokens that have them; returns the new maxima and the factor by which
        older sums shrink."""
        self.choice[at] = torch.where(top > self.top[at], index.cpu(), self.choice[at])
        fresh = torch.maximum(self.top[at], top)
        shrink = torch.exp(self.top[at] - fresh)
        self.top[at] = fresh
        self.total[at] *= shrink
        return fresh, shrink

    def pick(self, at: tuple[int, slice], logits: Tensor, targets: Tensor, first: int) -> None:
        """Keep the targets' logits where they lie in the slice that begins at vocabulary entry `first`."""
        inside = (targets >= first) & (targets < first + logits.shape[1])
        local = (targets - first).clamp(0, logits.shape[1] - 1)
        values = logits.gather(1, local[:, None].to(logits.device))[:, 0].cpu().double()
        self.target[at] = torch.where(inside, values, self.target[at])

    def lse(self) -> Tensor:
        return self.top + self.total.log()


def _finite(top: Tensor, name: str, at: tuple[int, slice]) -> Tensor:
    """The maxima in float64 on the CPU. NaN and infinity anywhere in a row show in its maximum."""
    top = top.cpu().double()
    bad = (~torch.isfinite(top)).nonzero()
    if len(bad):
        raise SourceError(
            f"'{name}' gives logits that are not finite, first in window {at[0]} at token {at[1].start + int(bad[0])}: "
            "a weight is damaged or the computation overflows; try --dtype float32, or check the folder with `verify`."
        )
    return top


def _spans(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, step):
        yield start, min(end, start + step)


@torch.no_grad()
def score(
    ids: Tensor,
    model: Head,
    reference: Head | None = None,
    *,
    columns: int,
    rows: int = ROWS,
    tile: int = TILE,
    streams: int = 1,
    names: Sequence[str] = (),
) -> Scores:
    """Score windows ids int64 [windows, tokens]; token i + 1 is predicted at position i, the last predicts nothing.

    `columns`: vocabulary entries of each head in memory at a time; `rows`, `tile`: positions and vocabulary entries of
    the logits at a time. Memory beyond the heads' slices: about four float32 [rows, tile]. `streams`: the model's head
    holds the windows that many times, one stream of hidden states after the other, as do the scores; the reference's
    logits are computed once for all of them; `names`: what errors call the streams. Raises SourceError naming model,
    window and token where logits are not finite.
    """
    windows, width = ids.shape[0], ids.shape[1] - 1
    heads = [model] if reference is None else [model, reference]
    names = names or [model.name] * streams
    ours, theirs = _Sums((streams * windows, width)), _Sums((windows, width))
    gap = torch.zeros(streams * windows, width, dtype=torch.float64)
    # The model's logit at the reference's best token so far: both prefer the same token if it is the model's maximum.
    rival = torch.zeros(streams * windows, width, dtype=torch.float64)

    def take(window: int, start: int, stop: int, first: int, last: int) -> None:
        part = slice(start, stop)
        targets = ids[window, start + 1 : stop + 1]
        if reference is not None:
            base = reference.logits(window, start, stop, first, last)
            best, index = base.max(dim=1)
            best = _finite(best, reference.name, (window, part))
            ahead = best > theirs.top[window, part]
            peak, shrink = theirs.rise((window, part), best, index + first)
            theirs.pick((window, part), base, targets, first)
            share = (base - peak[:, None].to(base)).exp_()
            theirs.total[window, part] += share.sum(dim=1).cpu().double()
        for stream in range(streams):
            at = (stream * windows + window, part)
            logits = model.logits(at[0], start, stop, first, last)
            most, place = logits.max(dim=1)
            top, _ = ours.rise(at, _finite(most, names[stream], (window, part)), place + first)
            ours.pick(at, logits, targets, first)
            if reference is not None:
                rival[at] = torch.where(ahead, logits.gather(1, index[:, None])[:, 0].cpu().double(), rival[at])
                # In the place of the reference's logits once nobody else needs them.
                differences = base.sub_(logits) if stream == streams - 1 else base - logits
                gap[at] = gap[at] * shrink + torch.linalg.vecdot(share, differences).cpu().double()
                del differences
            ours.total[at] += logits.sub_(top[:, None].to(logits)).exp_().sum(dim=1).cpu().double()

    try:
        for begin, end in _spans(0, model.vocabulary, columns):
            for head in heads:
                head.unload()
                head.load(begin, end)
            trim()  # what reading left on the heap would lie beside the logits
            for window in range(windows):
                for first, last in _spans(begin, end, tile):
                    for start, stop in _spans(0, width, rows):
                        take(window, start, stop, first, last)
    finally:
        for head in heads:
            head.unload()
    nll = ours.lse() - ours.target
    if reference is None:
        return Scores(nll, ours.choice)

    def each(x: Tensor) -> Tensor:
        return torch.cat([x] * streams)

    divergence = gap / each(theirs.total) - each(theirs.lse()) + ours.lse()
    other = each(theirs.lse() - theirs.target), each(theirs.choice)
    return Scores(nll, ours.choice, *other, divergence, rival == ours.top)
