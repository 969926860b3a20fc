"""What was seen at one input site: the folded statistics that methods read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lilliput.parts.transform import Scale, Transform
from lilliput.stats import bins


@dataclass(frozen=True)
class SiteStats:
    """Statistics of the inputs of one site, over `count` tokens. Fields that nobody asked for are None.

    All are float32 on the compute device. `gram` is the plain sum of x xT, [width, width];
    `square` the sum of x^2, `mean` the mean, `absmax` the largest |x|, `absmean` the mean |x|, `low` and `high` the
    smallest and largest x: all [width]; `extremes` the sums over samples of the smallest and of the largest x, and
    the number of samples, [3, width]; `histogram` how many |x| are in each bin, [width, bins.COUNT].
    """

    width: int
    count: int
    gram: Tensor | None = None
    square: Tensor | None = None
    mean: Tensor | None = None
    absmax: Tensor | None = None
    absmean: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    extremes: Tensor | None = None
    histogram: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """The statistic `name`. Raises RuntimeError where the method that reads it did not declare it in needs."""
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise RuntimeError(f"the statistic '{name}' was read but not collected: declare it in needs")
        return value

    def second_moment(self) -> Tensor:
        """Mean of x^2 by channel, [width], from whichever of `square` and `gram` was collected."""
        total = self.square if self.square is not None else self.need("gram").diagonal()
        return total / max(self.count, 1)

    def peaks(self) -> tuple[Tensor, Tensor]:
        """Means over samples of the smallest and of the largest input of each, by channel, [width]."""
        low, high, samples = self.need("extremes")
        return low / samples.clamp(min=1), high / samples.clamp(min=1)

    def norms(self, device: torch.device | str) -> Tensor:
        """Norm of each input over the tokens, up to a factor that all share, [width]; ones where no token came."""
        return self.second_moment().sqrt() if self.count else torch.ones(self.width, device=device)

    def scaled(self, factor: Tensor) -> SiteStats:
        """The statistics of x * factor (factor: [width]), as after a fold into whatever feeds the site."""

        def by(value: Tensor | None, f: Tensor) -> Tensor | None:
            return None if value is None else value * f

        size = factor.abs()
        low, high = by(self.low, factor), by(self.high, factor)
        if low is not None and high is not None:  # a negative factor turns them around
            low, high = torch.minimum(low, high), torch.maximum(low, high)
        return replace(
            self,
            gram=None if self.gram is None else (self.gram * factor[:, None]).mul_(factor),
            square=by(self.square, factor * factor),
            mean=by(self.mean, factor),
            absmax=by(self.absmax, size),
            absmean=by(self.absmean, size),
            low=low,
            high=high,
            extremes=None if self.extremes is None else _turned(self.extremes, factor),
            histogram=None if self.histogram is None else bins.scaled(self.histogram, size),
        )

    def through(self, transforms: Sequence[Transform]) -> SiteStats:
        """The statistics of T x: what the parts of a layer with these input transforms read.

        Absolute values and histograms do not survive a rotation: they become None, and `square` follows from the Gram
        matrix if it was collected.
        """
        stats = self
        for t in transforms:
            if isinstance(t, Scale):
                stats = stats.scaled(t.factor.float())
                continue
            gram = None if stats.gram is None else t.apply(t.apply(stats.gram).T)
            stats = SiteStats(
                stats.width,
                stats.count,
                gram=gram,
                square=None if gram is None or stats.square is None else gram.diagonal().clone(),
                mean=None if stats.mean is None else t.apply(stats.mean),
            )
        return stats

    def to(self, device: torch.device | str) -> SiteStats:
        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return replace(
            self,
            gram=move(self.gram),
            square=move(self.square),
            mean=move(self.mean),
            absmax=move(self.absmax),
            absmean=move(self.absmean),
            low=move(self.low),
            high=move(self.high),
            extremes=move(self.extremes),
            histogram=move(self.histogram),
        )


def _turned(extremes: Tensor, factor: Tensor) -> Tensor:
    """Sums of extremes of x * factor, which a negative factor exchanges."""
    low, high = extremes[0] * factor, extremes[1] * factor
    return torch.stack([torch.minimum(low, high), torch.maximum(low, high), extremes[2]])
