"""What every method that decides by trying owes its callers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from lilliput import methods
from lilliput.methods import index as catalogue
from lilliput.target import Target
from lilliput.verbs.scores import Budget, Loss, Share
from lilliput.verbs.search import Search
from lilliput.verbs.spec import Task

SEARCH = sorted(n for n, m in methods.discover().items() if isinstance(m.spec, Search))
SHAPES = {"a": (48, 48), "b": (16, 48), "c": (96, 48), "d": (48, 96)}


def _spec(name: str) -> Search[Any]:
    spec = methods.get(name).spec
    assert isinstance(spec, Search)
    return spec


def _next_step(name: str) -> Task:
    """The step that is tried out: the one after the method in its default recipe."""
    steps = catalogue.steps_of(name)
    step = steps[[x["method"] for x in steps].index(name) + 1]
    method = methods.get(step["method"])
    target = method.spec.completed(Target.model_validate(step.get("target", {})))
    return Task(1, method, target, method.parse(step.get("options", {})))


def _size(task: Task, shape: tuple[int, int], target: Target) -> int:
    made = task.method.scheme(target, task.options, *shape)
    return made.size_bits(*shape) // 8 if made.parts else 2 * shape[0] * shape[1]


def _budget(name: str) -> Budget:
    task = _next_step(name)

    def share(block: int, shape: tuple[int, int]) -> Share:
        return Share(block, shape, task.target, lambda target: _size(task, shape, target))

    return {linear: share(block, shape) for block, (linear, shape) in enumerate(SHAPES.items())}


def _gain(name: str, target: Target) -> float:
    """What a change does to the loss: lower ranks of `d` help, those of others hurt the more the lower they are."""
    if target.rank is None and target.ratio in (None, 1.0):
        return 0.0
    most = min(SHAPES[name])
    rank = most if target.rank is None else target.rank
    return (1 - rank / most) * (-0.3 if name == "d" else 0.1)


def _losses(seen: list[tuple[int, int]], hurts: bool = False) -> Loss:
    """A loss that notes how many changes each call had and how many calls may follow."""

    def loss(changes: Mapping[str, Target], left: int) -> float:
        seen.append((len(changes), left))
        gains = [_gain(name, target) for name, target in changes.items()]
        return 3.0 + sum(abs(x) if hurts else x for x in gains)

    return loss


@pytest.mark.parametrize("name", SEARCH)
def test_a_search_repeats_its_questions_and_its_answer(name: str) -> None:
    """A run that goes on after a kill asks anew and is told what it was told before."""
    spec, options = _spec(name), methods.get(name).parse({})
    asked: list[list[tuple[int, int]]] = [[], []]
    answers = [spec.run(_losses(seen), _budget(name), options) for seen in asked]
    assert asked[0] == asked[1]
    assert answers[0] == answers[1]
    assert answers[0][1].startswith(f"{name}: ")


@pytest.mark.parametrize("name", SEARCH)
def test_it_says_how_many_losses_may_follow_at_most(name: str) -> None:
    seen: list[tuple[int, int]] = []
    _spec(name).run(_losses(seen), _budget(name), methods.get(name).parse({}))
    assert all(len(seen) - number - 1 <= left for number, (_, left) in enumerate(seen))


@pytest.mark.parametrize("name", SEARCH)
def test_targets_are_of_linears_that_it_governs_and_can_be_had(name: str) -> None:
    budget, task = _budget(name), _next_step(name)
    found, _ = _spec(name).run(_losses([]), budget, methods.get(name).parse({}))
    assert found.keys() <= budget.keys()
    for linear, target in found.items():
        task.method.scheme(target, task.options, *SHAPES[linear])
    if _spec(name).keeps_budget:
        sizes = [(share.size(found.get(n, share.target)), share.size(share.target)) for n, share in budget.items()]  # type: ignore[misc]
        assert sum(now for now, _ in sizes) <= sum(before for _, before in sizes)


@pytest.mark.parametrize("name", [n for n in SEARCH if not _spec(n).keeps_budget])
def test_where_every_change_hurts_nothing_changes(name: str) -> None:
    found, _ = _spec(name).run(_losses([], hurts=True), _budget(name), methods.get(name).parse({}))
    assert all(target.rank is None and target.ratio == 1.0 for target in found.values())


@pytest.mark.parametrize("name", SEARCH)
def test_what_it_foresees_is_positive_and_within_the_samples(name: str) -> None:
    spec, options = _spec(name), methods.get(name).parse({})
    for samples in (1, 7, 128):
        assert 1 <= spec.looked_at(samples, options) <= samples
    assert 0 < spec.passes(4, options) <= spec.passes(8, options) < math.inf
    assert all(x in methods.discover() for x in spec.governs)


@pytest.mark.parametrize("name", SEARCH)
def test_a_target_that_leaves_nothing_to_try_is_refused(name: str) -> None:
    spec, options = _spec(name), methods.get(name).parse({})
    refuse: Callable[[Target, Any], str | None] | None = spec.refuse
    assert refuse is not None
    assert refuse(_next_step(name).target, options) is None
    assert refuse(_next_step(name).target.model_copy(update={"rank": 4, "ratio": None}), options)
