"""What every method that divides a budget by scores owes its callers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import methods
from lilliput.methods import index as catalogue
from lilliput.target import Target
from lilliput.verbs.allocate import Allocate
from lilliput.verbs.scores import Budget, Share
from lilliput.verbs.spec import Task
from lilliput.verbs.view import BlockIO

ALLOCATE = sorted(n for n, m in methods.discover().items() if isinstance(m.spec, Allocate))


def _next_step(name: str) -> Task:
    """The step whose target is divided: the one after the method in its default recipe."""
    steps = catalogue.steps_of(name)
    step = steps[[x["method"] for x in steps].index(name) + 1]
    method = methods.get(step["method"])
    target = method.spec.completed(Target.model_validate(step.get("target", {})))
    group = 16 if target.group_size == "auto" else target.group_size
    target = target.model_copy(update={"group_size": group, "scale_dtype": "float16"})
    return Task(1, method, target, method.parse(step.get("options", {})))


def _size(task: Task, shape: tuple[int, int], target: Target) -> int:
    """Bytes of a linear with this target; a plain tensor has two for each weight."""
    made = task.method.scheme(target, task.options, *shape)
    return made.size_bits(*shape) // 8 if made.parts else 2 * shape[0] * shape[1]


def _budget(name: str, toy: Any) -> Budget:
    task = _next_step(name)
    shapes = {x.name: (x.out_features, x.in_features) for x in toy.block.linears}

    def share(shape: tuple[int, int]) -> Share:
        return Share(0, shape, task.target, lambda target: _size(task, shape, target))

    return {linear: share(shape) for linear, shape in shapes.items()}


def _io(toy: Any) -> BlockIO:
    def squares(linear: str) -> Tensor:
        draw = torch.Generator().manual_seed(len(linear))
        return torch.rand(toy.tensors[linear].shape, generator=draw) + 0.1

    return replace(toy.io(), squares=squares)


def _spec(name: str) -> Allocate[Any]:
    spec = methods.get(name).spec
    assert isinstance(spec, Allocate)
    return spec


@pytest.mark.parametrize("name", ALLOCATE)
def test_inputs_are_left_alone_and_decisions_repeat(name: str, toy: Any) -> None:
    spec, options = _spec(name), methods.get(name).parse({})
    held = {n: t.clone() for n, t in toy.tensors.items()}
    io = _io(toy)
    kept = {n: x.scaled(torch.ones(x.width)) for n, x in io.stats.items()}
    first, again = (spec.score(toy.view(), io, options) for _ in range(2))
    assert all(torch.equal(toy.tensors[n], t) for n, t in held.items())
    for site, stats in kept.items():
        assert all(torch.equal(io.stats[site].need(n), stats.need(n)) for n in ("gram", "square", "absmean"))
    assert first == again
    before = dict(first)
    assert spec.run(first, _budget(name, toy), options) == spec.run(again, _budget(name, toy), options)
    assert first == before


@pytest.mark.parametrize("name", ALLOCATE)
def test_scores_are_plain_numbers_of_every_linear(name: str, toy: Any) -> None:
    """They go through the journal as JSON, and so do their names."""
    scores = _spec(name).score(toy.view(), _io(toy), methods.get(name).parse({}))
    assert scores.keys() == {x.name for x in toy.block.linears}
    for values in scores.values():
        assert values
        assert all(type(x) is float and x == x for x in values)


@pytest.mark.parametrize("name", ALLOCATE)
def test_every_linear_gets_a_target_and_the_budget_is_kept(name: str, toy: Any) -> None:
    spec, options, budget = _spec(name), methods.get(name).parse({}), _budget(name, toy)
    found = spec.run(spec.score(toy.view(), _io(toy), options), budget, options)
    assert found.keys() <= budget.keys()
    targets = {n: found.get(n, share.target) for n, share in budget.items()}
    sparsities = {n: t.sparsity for n, t in targets.items() if t.sparsity is not None}
    if sparsities:
        zeros = sum(budget[n].weights * x for n, x in sparsities.items())
        wanted = sum(x.weights * float(x.target.sparsity or 0.0) for x in budget.values())
        assert zeros == pytest.approx(wanted, rel=1e-6)
        assert all(0.0 <= x <= 1.0 for x in sparsities.values())
    sizes = [(share.size(targets[n]), share.size(share.target)) for n, share in budget.items() if share.size]
    assert sum(now for now, _ in sizes) <= sum(before for _, before in sizes)


@pytest.mark.parametrize("name", ALLOCATE)
def test_linears_that_are_alike_get_the_same(name: str, toy: Any) -> None:
    """The same matrix with the same inputs, once more."""
    spec, options, budget = _spec(name), methods.get(name).parse({}), _budget(name, toy)
    scores = spec.score(toy.view(), _io(toy), options)
    alike = {linear: replace(budget["up"]) for linear in ("up", "down", "q")}
    found = spec.run(dict.fromkeys(alike, scores["up"]), alike, options)
    assert len({found.get(n, share.target) for n, share in alike.items()}) == 1


@pytest.mark.parametrize("name", ALLOCATE)
def test_a_target_without_anything_to_divide_is_refused(name: str) -> None:
    spec, options = _spec(name), methods.get(name).parse({})
    assert spec.refuse is not None
    assert spec.refuse(_next_step(name).target, options) is None
    assert spec.refuse(Target(format="nf4", pattern="2:4"), options)
