"""Statistics as folds: any split of the tokens gives what one look at all of them gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilliput.stats import fold
from lilliput.stats.site import SiteStats


def _x(tokens: int = 300, width: int = 40) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(tokens, width, generator=g) @ torch.randn(width, width, generator=g) + 0.3


def _direct(x: Tensor) -> SiteStats:
    x = x.double()
    parts = (x.T @ x, (x * x).sum(0), x.mean(0), x.abs().amax(0), x.abs().mean(0))
    return SiteStats(x.shape[1], x.shape[0], *(p.float() for p in parts))


def _folded(x: Tensor, sizes: tuple[int, ...]) -> SiteStats:
    state = fold.init(x.shape[1], fold.NAMES)
    for part in x.split(sizes):  # type: ignore[arg-type]
        state = fold.update(state, part)
    return fold.finish(state)


def _close(a: SiteStats, b: SiteStats) -> None:
    """To 1e-5 of the largest entry: float32 sums in another order."""
    assert (a.width, a.count) == (b.width, b.count)
    for name in fold.NAMES:
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


_WORKER = """
import sys
import torch
import torch.distributed as dist
from lilliput.stats import fold

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x = torch.load(f"{folder}/x.pt", weights_only=True)
x = x[:210] if rank == 0 else x[210:]
state = fold.all_reduce(fold.finish(fold.update(fold.init(40, fold.NAMES), x)))
torch.save([state.count, *(state.need(n) for n in fold.NAMES)], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_count_as_one(tmp_path: Path) -> None:
    torch.save(_x(), tmp_path / "x.pt")
    started = [subprocess.Popen([sys.executable, "-c", _WORKER, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for count, *tensors in results:
        _close(SiteStats(40, count, *tensors), _direct(_x()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_alone_a_reduction_changes_nothing() -> None:
    state = _folded(_x(), (300,))
    assert fold.all_reduce(state) is state
