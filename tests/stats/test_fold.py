"""Statistics as folds: any split of the tokens gives what one look at all of them gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.stats import fold
from lilliput.stats.site import SiteStats

SUMS = tuple(name for name in fold.NAMES if name not in ("histogram", "extremes"))  # values of sums, or of the largest


def _x(tokens: int = 300, width: int = 40) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g)
        + 0.3
        + 90 * (torch.arange(width) == 5)
    )  # one channel is always positive


def _direct(x: Tensor) -> SiteStats:
    x = x.double()
    parts = (x.T @ x, (x * x).sum(0), x.mean(0), x.abs().amax(0), x.abs().mean(0), x.amin(0), x.amax(0))
    return SiteStats(x.shape[1], x.shape[0], *(p.float() for p in parts))


def _folded(x: Tensor, sizes: tuple[int, ...]) -> SiteStats:
    state = fold.init(x.shape[1], fold.NAMES)
    for part in x.split(sizes):  # type: ignore[arg-type]
        state = fold.update(state, part)
    return fold.finish(state)


def _close(a: SiteStats, b: SiteStats) -> None:
    """To 1e-5 of the largest entry: float32 sums in another order."""
    assert (a.width, a.count) == (b.width, b.count)
    for name in SUMS:
        x, y = a.need(name), b.need(name)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("sizes", [(300,), (1, 299), (100, 0, 150, 50)])
def test_a_fold_equals_the_direct_sum(sizes: tuple[int, ...]) -> None:
    _close(_folded(_x(), sizes), _direct(_x()))


def test_panels_and_leading_dimensions() -> None:
    x = torch.randn(2, 30, 1100, generator=torch.Generator().manual_seed(1))  # wider than two panels of the sum
    state = fold.finish(fold.update(fold.init(1100, ("gram",)), x))
    _gram = x.reshape(-1, 1100).double()
    torch.testing.assert_close(state.need("gram").double(), _gram.T @ _gram, rtol=0, atol=1e-3)
    assert torch.equal(state.need("gram"), state.need("gram").T)
    assert torch.equal(fold.finish(state).need("gram"), state.need("gram"))
    assert state.count == 60


def test_bfloat16_inputs_sum_in_float32() -> None:
    x = _x().bfloat16()
    _close(_folded(x, (300,)), _direct(x.float()))


def test_merge_equals_the_joint_fold() -> None:
    x = _x()
    halves = [_folded(p, (p.shape[0],)) for p in x.split((210, 90))]  # type: ignore[arg-type]
    _close(fold.merge(*halves), _direct(x))
    nothing = fold.init(40, fold.NAMES)
    _close(fold.merge(nothing, halves[0]), halves[0])
    assert fold.merge(nothing, nothing).count == 0


def test_merge_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="widths 4 and 5"):
        fold.merge(fold.init(4, ()), fold.init(5, ()))
    with pytest.raises(ValueError, match="'mean'"):
        fold.merge(fold.init(4, ("mean",)), fold.init(4, ()))
    with pytest.raises(ValueError, match="entropy"):
        fold.init(4, ("entropy",))


def test_a_statistic_that_nobody_asked_for() -> None:
    state = fold.update(fold.init(40, ("square",)), _x())
    with pytest.raises(RuntimeError, match="'gram' was read but not collected"):
        state.need("gram")
    torch.testing.assert_close(state.second_moment(), _x().square().mean(0), rtol=1e-5, atol=0)


def test_scaled_statistics_are_those_of_the_scaled_inputs() -> None:
    x, factor = _x(), torch.linspace(0.1, 2.0, 40) * torch.tensor([1.0, -1.0] * 20)
    _close(_folded(x, (300,)).scaled(factor), _direct(x * factor))


def test_extremes_are_sums_over_samples() -> None:
    x = torch.randn(5, 20, 8, generator=torch.Generator().manual_seed(2))
    state = fold.init(8, ("extremes",))
    for part in (x[:2], x[2:]):
        state = fold.update(state, part)
    low, high = state.peaks()
    torch.testing.assert_close(low, x.amin(1).clamp(max=0).mean(0))
    torch.testing.assert_close(high, x.amax(1).clamp(min=0).mean(0))
    turned_low, turned_high = state.scaled(torch.tensor([1.0, -2.0] * 4)).peaks()
    y = x * torch.tensor([1.0, -2.0] * 4)
    torch.testing.assert_close(turned_low, y.amin(1).clamp(max=0).mean(0))
    torch.testing.assert_close(turned_high, y.amax(1).clamp(min=0).mean(0))
    torch.testing.assert_close(fold.merge(state, state).peaks()[1], high)


_RANK = """
import torch
from lilliput.machine import ranks
from lilliput.stats import fold

with ranks.joined():
    x = torch.load("{folder}/x.pt", weights_only=True)
    seen = {{"some": x[:210] if rank == 0 else x[210:], "one": x if rank == 1 else x[:0], "none": x[:0]}}
    for name, part in seen.items():
        state = fold.all_reduce(fold.finish(fold.update(fold.init(40, fold.NAMES), part)))
        torch.save([state.count, *(state.need(n) for n in fold.NAMES)], f"{folder}/{{name}}-{{rank}}.pt")
"""


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path: Path, together: Callable[..., dict[str, Any]]) -> None:
    torch.save(_x(), tmp_path / "x.pt")
    done = together(code=_RANK.format(folder=tmp_path))
    assert done["code"] == [0, 0], done["stderr"]

    def found(name: str) -> list[list[Any]]:
        both: list[list[Any]] = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert both[0][0] == both[1][0]
        assert all(torch.equal(a, b) for a, b in zip(both[0][1:], both[1][1:], strict=True))
        return both

    for name in ("some", "one"):
        for count, *tensors in found(name):
            _close(SiteStats(40, count, *tensors), _direct(_x()))
    for count, *tensors in found("none"):
        assert count == 0
        assert not any(x.any() for x in tensors)


def test_alone_a_reduction_changes_nothing() -> None:
    state = _folded(_x(), (300,))
    assert fold.all_reduce(state) is state


@pytest.mark.parametrize("name", fold.NAMES)
def test_what_is_not_finite_is_named(name: str) -> None:
    fine = fold.update(fold.init(40, [name]), _x())
    assert fold.complete(fine, "block.0.up", torch.bfloat16).count == 300
    for bad in (float("-inf" if name == "low" else "inf"), float("nan")):
        x = _x()
        x[7, 3] = bad
        with pytest.raises(SourceError, match=r"block\.0\.up.*bfloat16.*--dtype float32"):
            fold.complete(fold.update(fold.init(40, [name]), x), "block.0.up", torch.bfloat16)
    with pytest.raises(SourceError) as error:
        fold.complete(fold.update(fold.init(40, [name]), x), "block.0.up", torch.float32)
    assert "--dtype" not in str(error.value)
