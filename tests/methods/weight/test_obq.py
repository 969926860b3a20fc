"""OBQ against its equations, one row and one weight at a time in float64."""

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.weight import gptq, obq, rtn
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def _case(rows: int = 12, width: int = 40, seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(300, width, generator=g) @ torch.randn(width, width, generator=g)
    gram = x.T @ x
    return torch.randn(rows, width, generator=g) * 0.05, SiteStats(width, 300, gram=gram, square=gram.diagonal())


def _part(layer: Layer) -> QuantizedPart:
    part = layer.parts[0]
    assert isinstance(part, QuantizedPart)
    return part


def _target(bits: int = 3, symmetric: bool = False) -> Target:
    return Target(bits=bits, group_size=16, symmetric=symmetric, scale_dtype="float32")


@pytest.mark.parametrize("outside_first", [True, False])
def test_equals_the_printed_algorithm(outside_first: bool) -> None:
    w, stats = _case()
    layer = obq.compress(Layer("x", w), stats, _target(), obq.Options(outside_first=outside_first))
    part = _part(layer)
    scale, zero = (x.double().expand(12, 40) for x in part.format.expand(part.grid, 40))
    gram = stats.need("gram").double()
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    for row in range(12):
        free, work, inverse = list(range(40)), w[row].double().clone(), torch.linalg.inv(h)
        codes = torch.zeros(40)
        while free:
            code = (torch.round(work / scale[row]) + zero[row]).clamp(-4, 3)
            miss = work - (code - zero[row]) * scale[row]
            loss = miss.square() / inverse.diagonal()
            if outside_first and bool((miss.abs() > 0.5 * scale[row] * (1 + 1e-9))[free].any()):
                loss = torch.where(miss.abs() > 0.5 * scale[row] * (1 + 1e-9), -loss, loss)
            q = min(free, key=lambda j: float(loss[j]))
            codes[q] = code[q]
            work = work - miss[q] / inverse[q, q] * inverse[:, q]
            inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
            inverse[q, q] = 1.0
            free.remove(q)
        assert torch.equal(codes, part.codes[row].float())


def test_in_the_fixed_order_it_is_gptq() -> None:
    """At most 2 codes in 1,000 differ, by ties: gptq computes in float32."""
    for symmetric in (True, False):
        w, stats = _case(rows=24, width=64)
        ours = obq.compress(Layer("x", w), stats, _target(4, symmetric), obq.Options(order="fixed"))
        options = gptq.Options(act_order=False, shrinkage=0.0, importance="gram")
        grid = _part(ours).grid
        theirs = gptq.compress(Layer("x", w), stats, _target(4, symmetric), options)
        assert torch.equal(grid.scale, _part(theirs).grid.scale)
        assert float((_part(ours).codes != _part(theirs).codes).double().mean()) <= 2e-3


def test_the_order_pays_and_rounding_alone_is_worse() -> None:
    def loss(layer: Layer) -> float:
        d = (layer.weight - layer.decode()).double()
        return float(((d @ stats.need("gram").double()) * d).sum())

    for seed in range(3):
        w, stats = _case(rows=16, width=64, seed=seed)
        greedy, fixed = (
            loss(obq.compress(Layer("x", w), stats, _target(), obq.Options(order=order)))  # type: ignore[arg-type]
            for order in ("greedy", "fixed")
        )
        nearest = loss(rtn.compress(Layer("x", w), stats, _target(), rtn.Options()))
        assert greedy < fixed < nearest


def test_rows_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w, stats = _case()
    whole = obq.compress(Layer("x", w), stats, _target(), obq.Options())
    monkeypatch.setattr(obq, "_ROOM", 3 * 40 * 40)
    assert torch.equal(obq.compress(Layer("x", w), stats, _target(), obq.Options()).decode(), whole.decode())


def test_large_linears_are_refused_by_the_plan() -> None:
    with pytest.raises(PlanError, match="use gptq, exclude the layer"):
        obq.scheme(_target(), obq.Options(), 4096, 4096)
    assert obq.scheme(_target(), obq.Options(), 576, 576).integer is not None
