"""OWL against its equations, and its decision inside the block loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.anatomy.model import Block, Groups, Linear, Site
from lilliput.errors import PlanError
from lilliput.methods.allocate import owl
from lilliput.plan.plan import make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step, Where
from lilliput.run import stream
from lilliput.run.journal import Work
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs import sparsity
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Share
from lilliput.verbs.view import BlockIO, BlockView


def block() -> Block:
    linears = (Linear("a", "q", "a", 6, 10), Linear("b", "k", "a", 4, 10), Linear("c", "down", "c", 10, 8))
    return Block(linears, (Site("a", 10, ("a", "b"), 0), Site("c", 8, ("c",), 1)), (), Groups())


@pytest.mark.parametrize("per", ["block", "linear"])
def test_shares_of_outliers_are_those_of_the_definition(per: str) -> None:
    rng = torch.Generator().manual_seed(0)
    inputs = {"a": torch.randn(50, 10, generator=rng) ** 3, "c": torch.randn(50, 8, generator=rng) ** 3}
    weights = {"a": (6, 10), "b": (4, 10), "c": (10, 8)}
    drawn = {n: torch.randn(s, generator=rng) ** 3 for n, s in weights.items()}
    stats = {n: SiteStats(x.shape[1], 50, square=x.square().sum(0)) for n, x in inputs.items()}
    got = owl.score(BlockView(block(), drawn), BlockIO(stats), owl.Options(multiple=2.0, per=per))

    slow: dict[str, list[float]] = {}
    for name, w in drawn.items():
        x = inputs["c" if name == "c" else "a"].double()
        slow[name] = [abs(float(w[i, j])) * float(x[:, j].norm()) for i in range(len(w)) for j in range(w.shape[1])]
    for name, values in slow.items():
        pool = [v for vs in slow.values() for v in vs] if per == "block" else values
        mean = sum(pool) / len(pool)
        assert got[name] == (sum(v > 2.0 * mean for v in values), len(values))
    assert sum(v[0] for v in got.values()) > 0


@given(
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    mean=st.floats(0.0, 1.0),
    spread=st.floats(0.0, 0.3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_mean_is_exact_and_outliers_protect(shares: list[float], mean: float, spread: float, data: Any) -> None:
    weights = data.draw(st.lists(st.integers(1, 10**6), min_size=len(shares), max_size=len(shares)))
    d, w = torch.tensor(shares, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    p = sparsity.divide(d, w, mean, spread)
    assert float((p * w).sum() / w.sum()) == pytest.approx(mean, abs=1e-12)
    assert float((p - mean).abs().max()) <= spread + 1e-12
    order = d.argsort()
    assert bool((p[order].diff() <= 1e-12).all()), "more outliers, less pruning"
    if len(set(shares)) == 1:
        assert bool((p == mean).all())


def test_the_slope_is_the_authors_where_nothing_is_clipped() -> None:
    p = sparsity.divide(
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64), 0.7, 0.08
    )
    torch.testing.assert_close(p, torch.tensor([0.78, 0.70, 0.62], dtype=torch.float64))


def test_blocks_share_a_sparsity_or_every_linear_has_its_own() -> None:
    target = Target(sparsity=0.5)
    budget = {f"{b}.{n}": Share(b, (2, 5), target) for b in (0, 1) for n in "xy"}
    scores = {"0.x": (0.0, 10.0), "0.y": (4.0, 10.0), "1.x": (8.0, 10.0), "1.y": (9.0, 10.0)}
    by_block = owl.allocate(scores, budget, owl.Options())
    assert by_block["0.x"].sparsity == by_block["0.y"].sparsity == pytest.approx(0.58)
    assert by_block["1.x"].sparsity == by_block["1.y"].sparsity == pytest.approx(0.42)
    by_linear = owl.allocate(scores, budget, owl.Options(per="linear"))
    assert len({t.sparsity for t in by_linear.values()}) == 4
    extreme = owl.allocate(
        scores, {n: Share(s.block, (2, 5), Target(sparsity=0.98)) for n, s in budget.items()}, owl.Options()
    )
    assert all(0.96 <= float(t.sparsity or 0) <= 1.0 for t in extreme.values())


def _plan(toy: Any, *steps: Step) -> Any:
    return make(
        toy.model, Recipe(steps=steps), samples=4, tokens=12, budget=None, size=None, seed=None, dtype=torch.float32
    )


def test_sparsities_differ_between_blocks_and_their_mean_is_the_recipes(toy: Any, tmp_path: Path) -> None:
    prune = Step(method="wanda", target=Target(sparsity=0.6))
    rows = {}
    for name, steps in {"owl": (Step(method="owl", options={"multiple": 2.0}), prune), "wanda": (prune,)}.items():
        made = _plan(toy, *steps)
        with Work(tmp_path / name, name) as work:
            rows[name] = stream.run(made, toy.model, toy.ids, work, Quiet())
    sizes = {x.name: x.linear.parameters for x in _plan(toy, prune).resolved.linears}
    for name, found in rows.items():
        mean = sum(r["zeros"] * sizes[r["name"]] for r in found) / sum(sizes.values())
        assert mean == pytest.approx(0.6, abs=0.02), name  # rows of 24 and 40 round to whole weights
    per_block = [{r["zeros"] for r in rows["owl"] if f"layers.{n}." in r["name"]} for n in range(3)]
    assert max(max(x) for x in per_block) - min(min(x) for x in per_block) > 0.08
    assert all(max(x) - min(x) < 0.06 for x in per_block)
    assert len({round(r["zeros"], 1) for r in rows["wanda"]}) == 1


def test_what_leaves_nothing_to_divide_is_refused(toy: Any) -> None:
    first = Step(method="owl")
    with pytest.raises(PlanError, match=r"step 1 \(owl\): the pattern 2:4 fixes"):
        _plan(toy, first, Step(method="wanda", target=Target(pattern="2:4")))
    with pytest.raises(PlanError, match="no sparsity to divide"):
        _plan(toy, first, Step(method="rtn"))
    with pytest.raises(PlanError, match="only divides a budget"):
        _plan(toy, first)
    with pytest.raises(PlanError, match="before step 1"):
        _plan(toy, Step(method="wanda"), first, Step(method="magnitude"))
    with pytest.raises(PlanError, match="no step after it"):
        _plan(
            toy,
            Step(method="owl", where=Where(include=("*q_proj",))),
            Step(method="wanda", where=Where(include=("*down_proj",))),
        )


def test_linears_outside_its_where_keep_the_recipes_sparsity(toy: Any) -> None:
    made = _plan(toy, Step(method="owl", where=Where(include=("*mlp*",))), Step(method="wanda"))
    governed = made.resolved.governed(made.resolved.of(Allocate)[0])
    assert governed
    assert all(".mlp." in name for name in governed)
