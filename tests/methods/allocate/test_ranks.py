"""Rank allocation: exact errors, a budget that is met from below, and what each rule makes least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lilliput.anatomy.model import Block, Groups, Linear, Site
from lilliput.errors import PlanError
from lilliput.methods.allocate import ranks
from lilliput.methods.weight import svd_truncate
from lilliput.parts.layer import Layer
from lilliput.plan.plan import make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step
from lilliput.run import delivery, stages, stream
from lilliput.run.journal import Work
from lilliput.runtime.linear import CompressedLinear
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.scores import Budget, Scores, Share
from lilliput.verbs.view import BlockIO, BlockView


def size_of(rows: int, width: int, itemsize: int = 2) -> Any:
    """Bytes with factors in half precision; a plain weight takes `itemsize`."""

    def size(target: Target) -> int:
        rank = svd_truncate.rank_of(target, rows, width)
        return itemsize * rows * width if rank is None else 2 * rank * (rows + width)

    return size


def falling(rows: int, width: int, decay: float, o: ranks.Options) -> tuple[float, ...]:
    """Scores of a layer whose squared singular values fall by `decay`."""
    energy = torch.tensor([decay**i for i in range(min(rows, width))], dtype=torch.float64)
    places = [0, *(ranks.rank_at(j, o.steps, rows, width) for j in range(1, o.steps))]
    return (float(rows), float(width), *(float(energy[k:].sum()) for k in places))


def case(
    shapes: list[tuple[int, int, float]], ratio: float, o: ranks.Options, itemsize: int = 2
) -> tuple[Scores, Budget]:
    scores = {f"{i}": falling(r, w, d, o) for i, (r, w, d) in enumerate(shapes)}
    budget = {
        f"{i}": Share(i, (r, w), Target(ratio=ratio), size_of(r, w, itemsize)) for i, (r, w, _) in enumerate(shapes)
    }
    return scores, budget


def total(budget: Budget, targets: Any) -> int:
    return sum(share.size(targets[name]) for name, share in budget.items() if share.size is not None)


@pytest.mark.parametrize("weighting", ["none", "absmean", "gram"])
def test_scores_are_the_errors_of_the_step_that_truncates(weighting: Any) -> None:
    g = torch.Generator().manual_seed(0)
    linears = (Linear("a", "q", "a", 18, 30), Linear("b", "k", "a", 40, 30))
    block = Block(linears, (Site("a", 30, ("a", "b"), 0),), (), Groups())
    x = torch.randn(100, 30, generator=g) @ torch.randn(30, 30, generator=g)
    stats = SiteStats(30, 100, gram=x.T @ x, absmean=x.abs().mean(0))
    weights = {n: torch.randn(r, 30, generator=g) for n, r in (("a", 18), ("b", 40))}
    o = ranks.Options(weighting=weighting, steps=5, measure="energy")
    found = ranks.score(BlockView(block, weights), BlockIO({"a": stats}), o)
    for name, w in weights.items():
        rows, width, whole, *errors = found[name]
        assert (rows, width) == w.shape
        assert whole == pytest.approx(float((x.double() @ w.double().T).square().sum()), rel=1e-5)
        for j, error in enumerate(errors, 1):
            rank = ranks.rank_at(j, 5, *w.shape)
            assert rank == svd_truncate.rank_of(Target(ratio=j / 5), *w.shape)
            options = svd_truncate.Options(weighting=weighting, factors="float32")
            out = svd_truncate.compress(Layer(name, w), stats, Target(rank=rank), options).decode()
            assert error == pytest.approx(float((x.double() @ (w - out).double().T).square().sum()), rel=1e-3)


def test_loss_weighs_errors_by_the_gradients_of_the_outputs() -> None:
    """E|g|^2 of each linear follows from squared gradients of its weights, exactly where tokens are independent."""
    g = torch.Generator().manual_seed(1)
    linears = (Linear("a", "q", "a", 18, 30), Linear("b", "k", "a", 40, 30))
    block = Block(linears, (Site("a", 30, ("a", "b"), 0),), (), Groups())
    x = torch.randn(100, 30, generator=g)
    stats = SiteStats(30, 100, gram=x.T @ x)
    weights = {n: torch.randn(r, 30, generator=g) for n, r in (("a", 18), ("b", 40))}
    slopes = {
        n: torch.randn(100, len(w), generator=g) * s for (n, w), s in zip(weights.items(), (1.0, 7.0), strict=True)
    }
    # One token a sample: the gradient by the weights is g xT.
    squares = {n: s.square().T @ x.square() / 100 for n, s in slopes.items()}
    plain = ranks.score(BlockView(block, weights), BlockIO({"a": stats}), ranks.Options(measure="energy"))
    io = BlockIO({"a": stats}, squares.__getitem__)
    found = ranks.score(BlockView(block, weights), io, ranks.Options(measure="loss"))
    for name, w in weights.items():
        rows, width, *errors = found[name]
        assert (rows, width) == w.shape
        energy = float((slopes[name].square().sum(1) * x.square().sum(1)).mean()) / float(x.square().sum())
        assert errors == pytest.approx([e * energy / rows for e in plain[name][2:]], rel=1e-5)
    empty = BlockIO({"a": SiteStats(30, 0)}, squares.__getitem__)
    nothing = ranks.score(BlockView(block, weights), empty, ranks.Options(measure="loss"))
    assert not any(nothing["a"][2:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(12, 60), st.integers(12, 60), st.floats(0.5, 1.0)), min_size=1, max_size=6),
    ratio=st.floats(0.25, 1.0),
    rule=st.sampled_from(["sum", "threshold"]),
    measure=st.sampled_from(["relative", "energy", "loss"]),
    itemsize=st.sampled_from([2, 4]),
)
def test_the_budget_is_met_from_below(
    shapes: list[tuple[int, int, float]], ratio: float, rule: Any, measure: Any, itemsize: int
) -> None:
    o = ranks.Options(rule=rule, measure=measure, steps=8)
    scores, budget = case(shapes, ratio, o, itemsize)
    targets = ranks.allocate(scores, budget, o)
    assert list(targets) == list(budget)
    most = total(budget, {n: s.target for n, s in budget.items()})
    spent = total(budget, targets)
    assert spent <= most
    for name, share in budget.items():
        (rank, rows, width) = (targets[name].rank, *map(int, scores[name][:2]))
        assert (rank is None) == (targets[name].ratio == 1.0)
        if rank is None or share.size is None:
            continue
        assert rank >= 1
        more = share.size(share.target.model_copy(update={"rank": rank + 1, "ratio": None}))
        whole = share.size(Target(ratio=1.0))
        assert spent - 2 * rank * (rows + width) + more > most or more >= whole, "a rank more would have fitted"


def test_equal_layers_get_equal_ranks_and_steep_ones_fewer() -> None:
    o = ranks.Options(steps=10, measure="relative")
    scores, budget = case([(40, 40, 0.9)] * 3, 0.5, o)
    assert {t.rank for t in ranks.allocate(scores, budget, o).values()} == {10}
    for rule in ("sum", "threshold"):
        chosen = ranks.Options(steps=10, rule=rule, measure="relative")  # type: ignore[arg-type]
        scores, budget = case([(40, 40, 0.7), (40, 40, 0.99)], 0.6, chosen)
        targets = ranks.allocate(scores, budget, chosen)
        flat = targets["1"].rank or 40
        assert (targets["0"].rank or 40) < flat


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.85])
def test_the_sum_is_close_to_the_least_of_all_divisions(ratio: float) -> None:
    """Below it lies max over prices p of sum_l min_j (e_lj + p size_lj) - p budget, whatever the division."""
    o = ranks.Options(steps=10, measure="relative")
    g = torch.Generator().manual_seed(0)
    decays = (0.8 + 0.195 * torch.rand(60, generator=g)).tolist()
    shapes = [((40, 40), (40, 120), (120, 40))[i % 3] for i in range(60)]
    scores, budget = case([(r, w, d) for (r, w), d in zip(shapes, decays, strict=True)], ratio, o)
    most = total(budget, {n: s.target for n, s in budget.items()})
    tails = [[sum(d**i for i in range(k, 40)) / sum(d**i for i in range(40)) for k in range(41)] for d in decays]
    points = []
    for (rows, width), tail in zip(shapes, tails, strict=True):
        size = size_of(rows, width)
        some = [ranks.rank_at(j, 10, rows, width) for j in range(1, 10)]
        own = [(tail[k], size(Target(rank=k))) for k in some] + [(0.0, size(Target(ratio=1.0)))]
        points.append(torch.tensor(own, dtype=torch.float64))
    bound = max(
        sum(float((p[:, 0] + price * p[:, 1]).min()) for p in points) - price * most
        for price in torch.logspace(-7, -3, 120).tolist()
    )
    targets = ranks.allocate(scores, budget, o)

    def error(chosen: Any) -> float:
        return sum(0.0 if t.rank is None else tail[t.rank] for t, tail in zip(chosen, tails, strict=True))

    assert error(targets.values()) <= 1.03 * bound
    equal = [Target(rank=svd_truncate.rank_of(Target(ratio=ratio), *shape)) for shape in shapes]
    assert error(targets.values()) < 0.95 * error(equal)


def test_one_threshold_cuts_all_curves() -> None:
    """STRS: the largest error of the division is the least that the budget allows, at the steps that are looked at."""
    o = ranks.Options(steps=10, rule="threshold", measure="relative")
    shapes = [(40, 40, 0.8), (40, 40, 0.93), (30, 50, 0.97)]
    scores, budget = case(shapes, 0.6, o)
    targets = ranks.allocate(scores, budget, o)
    most = total(budget, {n: s.target for n, s in budget.items()})

    def at(threshold: float) -> dict[str, Target]:
        found = {}
        for name in budget:
            rows, width, whole, *errors = scores[name]
            j = next((j for j, e in enumerate(errors, 1) if e / whole <= threshold), 10)
            rank = ranks.rank_at(j, 10, int(rows), int(width))
            found[name] = Target(ratio=1.0) if j == 10 else Target(rank=rank)
        return found

    thresholds = sorted({e / s[2] for s in scores.values() for e in s[3:]})
    least = next(t for t in thresholds if total(budget, at(t)) <= most)
    for name, target in targets.items():
        lowest = at(least)[name].rank
        if target.rank is not None:
            assert lowest is not None
            assert target.rank >= lowest


def _plan(toy: Any, *steps: Step) -> Any:
    return make(
        toy.model, Recipe(steps=steps), samples=4, tokens=12, budget=None, size=None, seed=None, dtype=torch.float32
    )


def test_what_cannot_be_divided_is_refused(toy: Any) -> None:
    svd = {"method": "svd-truncate"}
    with pytest.raises(PlanError, match=r"step 1 \(ranks\): the step that follows has no ratio"):
        _plan(toy, Step(method="ranks"), Step(method="rtn"))
    with pytest.raises(PlanError, match="no ratio to divide"):
        _plan(toy, Step(method="ranks"), Step(**svd, target=Target(rank=4)))
    with pytest.raises(PlanError, match=r"smallest ratio considered is 0\.25"):
        _plan(toy, Step(method="ranks", options={"steps": 4}), Step(**svd, target=Target(ratio=0.2)))


def test_a_whole_run_writes_what_the_divided_plan_says(toy: Any, tmp_path: Path) -> None:
    """The folder is described by the plan that was carried out, and is no larger than the one that was shown."""
    recipe = Recipe(
        steps=(
            Step(method="ranks", options={"steps": 8}),
            Step(method="svd-truncate", target=Target(ratio=0.7), options={"weighting": "gram"}),
        )
    )
    before = _plan(toy, *recipe.steps)
    with Work(tmp_path / "out", "key") as work:
        stream.run(before, toy.model, toy.ids, work, Quiet())
        after = stages.decided(before, toy.model, work)
        delivery.write_loadable(work.staging, delivery.Delivery(after, toy.model, "key", None, (), work.hashes()))
        whole = AutoModelForCausalLM.from_pretrained(work.staging)
        written = sum(path.stat().st_size for path in work.staging.glob("*.safetensors"))
    assert written == after.bytes
    assert sum(x.nbytes for x in after.tensors) <= sum(x.nbytes for x in before.tensors)
    assert any("whose total is the most that will be written" in note for note in before.notes)
    chosen = {x.name: x.scheme for x in after.resolved.linears}
    held = {n: m.spec.scheme for n, m in whole.named_modules() if isinstance(m, CompressedLinear)}
    assert held == {n: scheme for n, scheme in chosen.items() if scheme.parts}
    assert len({scheme.describe() for scheme in chosen.values()}) > 2
    assert bool(torch.isfinite(whole(toy.ids[:1]).logits).all())
