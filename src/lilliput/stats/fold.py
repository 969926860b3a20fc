"""Statistics as folds over batches of inputs: init, update, merge. A fold owns its buffers, updated in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lilliput.errors import SourceError, ToldError
from lilliput.machine import ranks
from lilliput.stats import bins
from lilliput.stats.site import SiteStats

NAMES = ("gram", "square", "mean", "absmax", "absmean", "low", "high", "extremes", "histogram")
_PANEL = 512


@contextmanager
def reduced_products(enabled: bool) -> Iterator[None]:
    """Let float32 matrix products round their factors to bfloat16 (sums stay float32) where the CPU does that fast.

    For inputs that already are bfloat16 values the products are the exact ones.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if enabled:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def init(width: int, names: Iterable[str], device: torch.device | str = "cpu") -> SiteStats:
    """Empty statistics for a site of `width` channels. Raises ValueError for a name not in NAMES."""
    chosen = set(names)
    if chosen - set(NAMES):
        raise ValueError(f"unknown statistics {sorted(chosen - set(NAMES))}: choose from {NAMES}")

    def zeros(name: str, *shape: int) -> Tensor | None:
        return torch.zeros(*shape, device=device) if name in chosen else None

    return SiteStats(
        width,
        0,
        gram=zeros("gram", width, width),
        square=zeros("square", width),
        mean=zeros("mean", width),
        absmax=zeros("absmax", width),
        absmean=zeros("absmean", width),
        low=zeros("low", width),
        high=zeros("high", width),
        extremes=zeros("extremes", 3, width),
        histogram=zeros("histogram", width, bins.COUNT),
    )


def update(state: SiteStats, x: Tensor) -> SiteStats:
    """Fold inputs x [..., width] in; the buffers of `state` are updated in place and belong to the result.

    The Gram matrix is summed panel by panel over its upper half only; `finish` mirrors it.
    """
    samples = x if x.dim() == 3 else x.reshape(1, -1, state.width)
    x = x.reshape(-1, state.width)
    tokens = x.shape[0]
    if tokens == 0:
        return state
    exact = x.dtype == torch.bfloat16
    x = x.float()
    count = state.count + tokens
    if state.gram is not None:
        with reduced_products(exact):
            for a in range(0, state.width, _PANEL):
                b = min(a + _PANEL, state.width)
                state.gram[a:b, a:].addmm_(x[:, a:b].T, x[:, a:])
    if state.square is not None:
        state.square.add_((x * x).sum(0))
    if state.mean is not None:
        state.mean.mul_(state.count / count).add_(x.sum(0), alpha=1 / count)
    if state.absmax is not None:
        torch.maximum(state.absmax, x.abs().amax(0), out=state.absmax)
    if state.low is not None or state.high is not None:
        low, high = torch.aminmax(x, dim=0)
        broken = (low + high) * 0.0  # NaN where either is not finite: an infinity would not show in the other one
        for extreme, seen, of in ((state.low, low, torch.minimum), (state.high, high, torch.maximum)):
            if extreme is not None:
                extreme.copy_(of(extreme, seen + broken) if state.count else seen + broken)
    if state.extremes is not None:
        low, high = torch.aminmax(samples.float(), dim=1)
        state.extremes[0].add_(low.clamp_(max=0).sum(0))
        state.extremes[1].add_(high.clamp_(min=0).sum(0))
        state.extremes[2].add_(len(samples))
    if state.absmean is not None:
        state.absmean.mul_(state.count / count).add_(x.abs().sum(0), alpha=1 / count)
    if state.histogram is not None:
        state.histogram.add_(bins.counts(x))
    return replace(state, count=count)


def finish(state: SiteStats) -> SiteStats:
    """Mirror the upper half of the Gram matrix into the lower one. Idempotent."""
    if state.gram is not None:
        for a in range(0, state.width, _PANEL):
            b = min(a + _PANEL, state.width)
            corner = state.gram[a:b, a:b]
            corner.copy_(torch.triu(corner) + torch.triu(corner, 1).T)
            state.gram[b:, a:b] = state.gram[a:b, b:].T
    return state


def complete(state: SiteStats, site: str, dtype: torch.dtype) -> SiteStats:
    """The finished statistics of all processes' tokens.

    Raises SourceError that names the site where inputs, or sums of their squares, overflow; dtype: what the model
    computes in.
    """
    total = all_reduce(finish(state))
    counts = None if total.histogram is None else total.histogram[:, 0]  # NaN is in all bins
    totals = (total.gram, total.square, total.mean, total.absmax, total.absmean, total.low, total.high, counts)
    sums = None if total.extremes is None else total.extremes.sum(0)
    # The diagonal is what overflows first.
    extremes = [x.diagonal() if x.dim() == 2 else x for x in (*totals, sums) if x is not None]
    if all(bool(torch.isfinite(x).all()) for x in extremes):
        return total
    how = str(dtype).removeprefix("torch.")
    remedy = "check" if dtype is torch.float32 else "try --dtype float32, or check"
    raise (SourceError if ranks.lead() else ToldError)(
        f"{site}: its inputs hold NaN, infinity or numbers too large to be squared. The model overflows in {how} on "
        f"this text, or a weight before it is broken: {remedy} the model's weights"
    )


def merge(a: SiteStats, b: SiteStats) -> SiteStats:
    """Statistics of the two sets of tokens together. Raises ValueError when the sites differ."""
    if a.width != b.width:
        raise ValueError(f"cannot merge statistics of widths {a.width} and {b.width}")
    count = a.count + b.count
    share = torch.tensor([a.count, b.count], dtype=torch.float64) / max(count, 1)
    wa, wb = float(share[0]), float(share[1])

    def both(name: str) -> tuple[Tensor, Tensor] | None:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None):
            raise ValueError(f"cannot merge: only one side has '{name}'")
        return None if x is None else (x, y)

    def total(name: str) -> Tensor | None:
        pair = both(name)
        return None if pair is None else pair[0] + pair[1]

    def mean(name: str) -> Tensor | None:
        pair = both(name)
        return None if pair is None else pair[0] * wa + pair[1] * wb

    def extreme(name: str, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        pair = both(name)
        if pair is not None and not (a.count and b.count):  # one that saw nothing has no extremes
            return pair[0] if a.count else pair[1]
        return None if pair is None else of(*pair)

    return SiteStats(
        a.width,
        count,
        gram=total("gram"),
        square=total("square"),
        mean=mean("mean"),
        absmax=extreme("absmax", torch.maximum),
        absmean=mean("absmean"),
        low=extreme("low", torch.minimum),
        high=extreme("high", torch.maximum),
        extremes=total("extremes"),
        histogram=total("histogram"),
    )


def all_reduce(state: SiteStats) -> SiteStats:
    """Merge over the processes of a run (a no-op for a single one); a site that one of them never saw adds nothing."""
    if ranks.size() == 1:
        return state
    count = sum(ranks.gathered(state.count))
    for total in (state.gram, state.square, state.extremes, state.histogram):
        if total is not None:
            ranks.add(total)
    for mean in (state.mean, state.absmean):
        if mean is not None:
            ranks.add(mean.mul_(state.count / max(count, 1)))
    if state.absmax is not None:
        ranks.largest(state.absmax)
    for extreme, sign in ((state.high, 1), (state.low, -1)):
        if extreme is not None and count:
            extreme.mul_(sign) if state.count else extreme.fill_(-torch.inf)
            ranks.largest(extreme)
            extreme.mul_(sign)
    return replace(state, count=count)
