"""OWQ against its equations in float64, and at its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.integer import IntegerFormat
from lilliput.methods.weight import gptq, owq
from lilliput.parts.columns import ColumnsPart
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _case(rows: int = 24, width: int = 60, seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    x = torch.randn(400, width, generator=g) @ mix / width**0.5
    return torch.randn(rows, width, generator=g) * 0.05, SiteStats(width, 400, gram=x.T @ x)


def _target(bits: int = 3, group: int | str = "channel", symmetric: bool = False) -> Target:
    return Target(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="float32")


def _loss(w: Tensor, layer: Layer, stats: SiteStats) -> float:
    d = (w - layer.decode()).double()
    return float(((d @ stats.need("gram").double()) * d).sum())


def _slow(w: Tensor, gram: Tensor, count: int, form: IntegerFormat) -> tuple[Tensor, list[int]]:
    grid = form.fit(w)
    miss = (form.decode(form.encode(w, grid), grid) - w).double().square().sum(0)
    kept = (miss * gram.double().diagonal()).argsort(descending=True)[:count].tolist()
    order = [j for j in gram.diagonal().argsort(descending=True, stable=True).tolist() if j not in kept]
    order += sorted(kept, key=lambda j: -float(gram[j, j]))
    left = w.clone()
    left[:, kept] = 0  # a range always holds 0
    step, zero = (x.double().expand_as(w) for x in form.expand(form.fit(left), w.shape[1]))
    h = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    work, out = w.double().clone(), torch.zeros_like(w).double()
    for n, j in enumerate(order):
        code = (torch.round(work[:, j] / step[:, j]) + zero[:, j]).clamp(form.lowest, form.highest)
        out[:, j] = work[:, j] if j in kept else (code - zero[:, j]) * step[:, j]
        work[:, order[n:]] -= ((work[:, j] - out[:, j]) / u[n, n]).unsqueeze(1) * u[n, n:]
    return out, sorted(kept)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", ["channel", 16])
def test_equals_the_equations(symmetric: bool, group: int | str) -> None:
    """The same columns, values to half precision but for ties of rounding: at most 1 in 200."""
    w, stats = _case()
    o = owq.Options(columns=5, shrinkage=0.0, search="minmax")
    layer = owq.compress(Layer("x", w), stats, _target(3, group, symmetric), o)
    form = IntegerFormat(3, symmetric, -1 if group == "channel" else 16, torch.float32)
    slow, kept = _slow(w, stats.need("gram"), 5, form)
    dense, columns = layer.parts
    assert isinstance(columns, ColumnsPart)
    assert columns.columns.tolist() == kept
    near = torch.isclose(layer.decode().double(), slow, rtol=2e-3, atol=1e-4)
    assert float((~near).double().mean()) <= 5e-3
    assert bool((dense.decode()[:, kept] == 0).all())


def test_a_search_that_counts_all_inputs_alike_leaves_out_the_kept_ones() -> None:
    """The range of each row is the best of the shares tried for the weights that stay, the columns being chosen."""
    w, stats = _case()
    o = owq.Options(columns=5, importance=False)
    dense, columns = owq.compress(Layer("x", w), stats, _target(), o).parts
    assert isinstance(dense, QuantizedPart)
    assert isinstance(columns, ColumnsPart)
    form = IntegerFormat(3, False, -1, torch.float32)
    stay = [j for j in range(w.shape[1]) if j not in columns.columns.tolist()]

    def error(grid: object) -> Tensor:
        step, zero = form.expand(grid, w.shape[1])  # type: ignore[arg-type]
        code = (torch.round(w / step) + zero).clamp(form.lowest, form.highest)
        return ((code - zero) * step - w)[:, stay].double().square().sum(1)

    weighed = owq.compress(Layer("x", w), stats, _target(), owq.Options(columns=5)).parts[0]
    assert isinstance(weighed, QuantizedPart)
    only = form.fit(w[:, stay])
    assert bool((error(dense.grid) <= error(only) + 1e-9).all())
    assert float(error(dense.grid).sum()) < float(error(weighed.grid).sum())


def test_no_columns_is_gptq() -> None:
    w, stats = _case()
    for group in ("channel", 16, "tensor"):
        layer = owq.compress(Layer("x", w), stats, _target(group=group), owq.Options(columns=0))
        (wanted,) = gptq.compress(Layer("x", w), stats, _target(group=group), gptq.Options()).parts
        assert isinstance(wanted, QuantizedPart)
        assert isinstance(layer.parts[0], QuantizedPart)
        assert torch.equal(layer.parts[0].codes, wanted.codes)


def test_all_columns_are_the_identity() -> None:
    w, stats = _case()
    layer = owq.compress(Layer("x", w), stats, _target(), owq.Options(columns=60))
    assert torch.equal(layer.decode(), w.half().float())


def test_each_kept_column_pays() -> None:
    w, stats = _case(seed=4)
    losses = [
        _loss(w, owq.compress(Layer("x", w), stats, _target(), owq.Options(columns=k)), stats) for k in (0, 2, 6, 20)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.95 * losses[0]


def test_the_number_of_columns_is_planned() -> None:
    assert owq.column_count(owq.Options(extra=0.1), 576, 1536) == 9  # 0.1 * 576 * 1536 / (16 * 576 + 32)
    assert owq.column_count(owq.Options(extra=0.0), 576, 1536) == 0
    assert owq.column_count(owq.Options(extra=16.0), 4, 10) == 6
    made = owq.scheme(_target(), owq.Options(extra=0.1), 576, 1536)
    plain = IntegerFormat(3, False, -1, torch.float32).size_bits(576, 1536)
    assert 0.09 < (made.size_bits(576, 1536) - plain) / (576 * 1536) <= 0.1
    with pytest.raises(PlanError, match=r"owq\.columns to 10"):
        owq.scheme(_target(), owq.Options(columns=11), 4, 10)
