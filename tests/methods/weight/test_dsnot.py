"""DSnoT against its loop, row by row in float64."""

import pytest
import torch
from torch import Tensor

from lilliput.methods.weight import dsnot, sparsegpt, wanda
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 14, 48


def _case(seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, WIDTH, generator=g) * torch.exp(torch.randn(WIDTH, generator=g))
    x = x + torch.randn(WIDTH, generator=g)
    w = torch.randn(ROWS, WIDTH, generator=g)
    return w, SiteStats(WIDTH, 200, gram=x.T @ x, square=x.square().sum(0), mean=x.mean(0))


def _support(layer: Layer) -> Tensor:
    assert layer.support is not None
    return layer.support


def _reference(w: Tensor, mask: Tensor, stats: SiteStats, cycles: int, threshold: float, group: int | None) -> Tensor:
    mean, square = stats.need("mean").double(), stats.need("square").double() / stats.count
    variance, mask = square - mean.square(), mask.clone()
    for row in range(ROWS):
        given = w[row].double() * mean
        error = float(given[~mask[row]].sum())
        passed: set[int] = set()
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            growing = [j for j in range(WIDTH) if not mask[row, j] and given[j] * error > 0 and j not in passed]
            if not growing:
                break
            grow = max(growing, key=lambda j: float(given[j].abs() / variance[j]))
            among = range(WIDTH) if group is None else range(grow // group * group, (grow // group + 1) * group)
            pruning = [j for j in among if mask[row, j] and given[j] * error < 0]
            if not pruning and group is None:
                break
            if not pruning:
                passed.add(grow)
                continue
            prune = min(pruning, key=lambda j: float(w[row, j].double().abs() * square[j].sqrt()))
            after = error + float(given[prune] - given[grow])
            if after * error < 0:
                break
            mask[row, grow], mask[row, prune], error = True, False, after
    return mask


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
@pytest.mark.parametrize(("cycles", "threshold"), [(50, 0.1), (3, 0.1), (50, 1.0), (50, 0.0)])
def test_equals_the_printed_loop(pattern: str | None, cycles: int, threshold: float) -> None:
    w, stats = _case()
    target = Target(sparsity=None if pattern else 0.5, pattern=pattern)
    pruned = wanda.compress(Layer("x", w), stats, target, wanda.Options())
    options = dsnot.Options(cycles=cycles, threshold=threshold)
    got = _support(dsnot.compress(pruned, stats, target, options))
    group = None if pattern is None else int(pattern.split(":")[1])
    assert torch.equal(got, _reference(w, _support(pruned), stats, cycles, threshold, group))
    assert bool((got != _support(pruned)).any())


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_zeros_move_and_the_mean_error_never_grows(pattern: str | None) -> None:
    for seed in range(4):
        w, stats = _case(seed)
        target = Target(sparsity=None if pattern else 0.6, pattern=pattern)
        pruned = wanda.compress(Layer("x", w), stats, target, wanda.Options())
        out = dsnot.compress(pruned, stats, target, dsnot.Options())
        assert torch.equal(_support(out).sum(1), _support(pruned).sum(1))
        if pattern:
            assert bool((_support(out).view(ROWS, -1, 4).sum(2) == 2).all())
        mean = stats.need("mean").double()
        before, after = (((w - x.decode()).double() @ mean).abs() for x in (pruned, out))
        assert bool((after <= before + 1e-5).all())
        assert float(after.sum()) < 0.9 * float(before.sum())


def test_no_cycles_leave_the_mask() -> None:
    w, stats = _case()
    pruned = wanda.compress(Layer("x", w), stats, Target(sparsity=0.5), wanda.Options())
    out = dsnot.compress(pruned, stats, Target(sparsity=0.5), dsnot.Options(cycles=0))
    assert torch.equal(_support(out), _support(pruned))


def test_values_updated_for_another_mask_are_dropped() -> None:
    w, stats = _case()
    pruned = sparsegpt.compress(Layer("x", w), stats, Target(sparsity=0.5), sparsegpt.Options())
    out = dsnot.compress(pruned, stats, Target(sparsity=0.5), dsnot.Options())
    assert torch.equal(out.decode(), w * _support(out))
