"""SAMSP: sensitivities from their definition, and the division that they lead to."""

import math
from typing import Any

import pytest
import torch

from lilliput.anatomy.model import Block, Linear, Site
from lilliput.methods.allocate import samsp
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.scores import Share
from lilliput.verbs.view import BlockIO, BlockView

SIZES = {"a": (6, 8), "b": (5, 8), "c": (4, 10)}


def _case() -> tuple[BlockView, BlockIO, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    inputs = {n: torch.randn(50, s[1], generator=g) * 3.0**k for k, (n, s) in enumerate(SIZES.items())}
    linears = tuple(Linear(n, "up", n, *s) for n, s in SIZES.items())
    sites = tuple(Site(n, s[1], (n,), k) for k, (n, s) in enumerate(SIZES.items()))
    stats = {n: SiteStats(x.shape[1], 50, gram=x.T @ x, square=x.square().sum(0)) for n, x in inputs.items()}
    weights = {n: torch.randn(*s, generator=g) for n, s in SIZES.items()}
    return BlockView(Block(linears, sites, (), ()), weights), BlockIO(stats), inputs


def _budget(sparsity: float) -> dict[str, Share]:
    return {n: Share(0, s, Target(sparsity=sparsity)) for n, s in SIZES.items()}


def _sparsities(found: Any) -> dict[str, float]:
    return {n: float(t.sparsity) for n, t in found.items()}


def test_sensitivities_are_mean_squares_of_inputs_or_outputs() -> None:
    view, io, inputs = _case()
    for measure in ("trace", "energy"):
        scores = samsp.score(view, io, samsp.Options.model_validate({"measure": measure}))
        for name, x in inputs.items():
            seen = x.double() if measure == "trace" else x.double() @ view.weights[name].double().T
            assert scores[name][0] == pytest.approx(float(seen.square().mean()), rel=1e-5)


def test_sensitive_linears_are_pruned_less_and_the_mean_is_exact() -> None:
    scores = {"a": (1.0,), "b": (10.0,), "c": (100.0,)}
    for sparsity in (0.5, 0.02, 0.97):
        got = _sparsities(samsp.allocate(scores, _budget(sparsity), samsp.Options(spread=0.05)))
        total = sum(got[n] * math.prod(s) for n, s in SIZES.items())
        assert total == pytest.approx(sparsity * sum(math.prod(s) for s in SIZES.values()), rel=1e-12)
        assert got["a"] > got["b"] > got["c"]
        assert all(abs(p - sparsity) <= 0.05 + 1e-12 for p in got.values())
    linear = _sparsities(samsp.allocate(scores, _budget(0.5), samsp.Options(scale="linear")))
    assert linear["a"] - linear["b"] < 0.2 * (linear["b"] - linear["c"])


def test_equal_sensitivities_give_equal_sparsities() -> None:
    got = _sparsities(samsp.allocate(dict.fromkeys(SIZES, (3.0,)), _budget(0.6), samsp.Options()))
    assert set(got.values()) == {0.6}
    unreached = _sparsities(samsp.allocate(dict.fromkeys(SIZES, (0.0,)), _budget(0.6), samsp.Options()))
    assert set(unreached.values()) == {0.6}
