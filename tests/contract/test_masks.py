"""What every method that prunes keeps: exact counts in each scope, ties decided, nothing at either end."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from lilliput.methods import discover
from lilliput.parts.layer import Layer
from lilliput.stats import bins
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.compress import Compress

ROWS, WIDTH = 7, 24
HISTOGRAM = torch.ones(WIDTH, bins.COUNT)
CASES = [
    (method, scope)
    for _, method in sorted(discover().items())
    if isinstance(method.spec, Compress) and method.spec.writes == "support" and not method.spec.refines
    for scope in get_args(method.options.model_fields["scope"].annotation)
]


def support(name: str, scope: str, weight: torch.Tensor, **target: object) -> torch.Tensor:
    method = discover()[name]
    stats = SiteStats(WIDTH, 5, gram=2.0 * torch.eye(WIDTH), square=torch.full((WIDTH,), 2.0), histogram=HISTOGRAM)
    layer = Layer("x", weight, fisher=torch.full_like(weight, 0.5))
    layer = method.spec.run(layer, stats, Target.model_validate(target), method.parse({"scope": scope}))
    assert isinstance(layer, Layer)
    assert layer.support is not None
    assert torch.equal(layer.decode(), weight * layer.support), "unrelated inputs: no weight moves"
    spec, (rows, width) = method.spec, weight.shape
    assert spec.kept is not None, "a method that prunes says how many weights it keeps"  # type: ignore[attr-defined]
    asked, options = Target.model_validate(target), method.parse({"scope": scope})
    assert int(layer.support.sum()) == spec.kept(asked, options, rows, width)  # type: ignore[attr-defined]
    return layer.support


def test_there_are_methods_that_prune() -> None:
    assert {method.name for method, _ in CASES} >= {"magnitude", "wanda", "sparsegpt"}


@pytest.mark.parametrize(("method", "scope"), CASES, ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("share", [0.0, 0.07, 0.3, 0.5, 0.9, 1.0])
def test_exactly_the_share_of_each_scope_leaves(method: object, scope: str, share: float) -> None:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    kept = support(method.name, scope, weight, sparsity=share)  # type: ignore[attr-defined]
    units = kept if scope == "row" else kept.view(1, -1)
    assert units.sum(1).tolist() == [units.shape[1] - round(share * units.shape[1])] * len(units)
    assert bool(kept.all()) == (share == 0.0)
    assert bool(kept.any()) == (share < 1.0)


@pytest.mark.parametrize(("method", "scope"), CASES, ids=lambda x: getattr(x, "name", x))
def test_equal_scores_are_decided_by_place(method: object, scope: str) -> None:
    """All weights are worth the same: the earlier ones stay, in either sign."""
    weight = torch.where(torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 3 == 0, -1.0, 1.0)
    kept = support(method.name, scope, weight, sparsity=0.5)  # type: ignore[attr-defined]
    units = kept if scope == "row" else kept.view(1, -1)
    half = units.shape[1] - round(0.5 * units.shape[1])
    assert bool(units[:, :half].all())
    assert not bool(units[:, half:].any())
    pattern = support(method.name, scope, weight, pattern="2:6")  # type: ignore[attr-defined]
    assert pattern.view(-1, 6).int().tolist() == [[1, 1, 0, 0, 0, 0]] * (ROWS * WIDTH // 6)
