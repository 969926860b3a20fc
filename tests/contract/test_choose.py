"""What every method that foresees the losses of a menu owes its callers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lilliput import methods
from lilliput.budget import menu
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.choose import Choose

CHOOSE = sorted(n for n, m in methods.discover().items() if isinstance(m.spec, Choose))
WIDTH = 48  # of the toy's residual stream
ENTRIES = ("int2/16/asym", "int3/16/asym", "int4/16", "int8/16")


def _spec(name: str) -> Choose[Any]:
    spec = methods.get(name).spec
    assert isinstance(spec, Choose)
    return spec


def _targets() -> list[Target]:
    return [menu.on(Target(bits=2, scale_dtype="float16"), x) for x in ENTRIES]


def _scored(name: str, toy: Any, rows: torch.Tensor | None, stats: SiteStats | None = None) -> tuple[float, ...]:
    weight = toy.tensors["q"]
    seen = toy.io().stats["q"] if stats is None else stats
    return _spec(name).score(weight, seen, _targets(), rows, methods.get(name).parse({}))


@pytest.mark.parametrize("name", CHOOSE)
def test_losses_are_finite_positive_and_fall_with_bits(name: str, toy: Any) -> None:
    found = _scored(name, toy, None)
    assert len(found) == len(ENTRIES)
    assert all(math.isfinite(x) and x > 0 for x in found)
    assert list(found) == sorted(found, reverse=True)
    assert found == _scored(name, toy, None) == pytest.approx(_scored(name, toy, torch.ones(WIDTH)))


@pytest.mark.parametrize("name", CHOOSE)
def test_outputs_that_cost_more_lose_more(name: str, toy: Any) -> None:
    once, twice = (_scored(name, toy, x * torch.ones(WIDTH)) for x in (1.0, 2.0))
    assert twice == pytest.approx([2 * x for x in once], rel=1e-5)


@pytest.mark.parametrize("name", CHOOSE)
def test_a_linear_that_no_token_reached_loses_nothing(name: str, toy: Any) -> None:
    nothing = replace(toy.io().stats["q"], count=0)
    assert _scored(name, toy, None, nothing) == (0.0,) * len(ENTRIES)


@pytest.mark.parametrize("name", CHOOSE)
def test_its_menu_goal_and_trials_follow_from_its_options(name: str) -> None:
    spec, options = _spec(name), methods.get(name).parse({})
    assert spec.entries(options)
    assert (spec.looked_at(128, options), spec.looked_at(3, options)) == (4, 1)
    assert spec.goal(options).size is None
    assert all(x in methods.discover() for x in spec.governs)
    assert spec.trials(options).alone > 0
    assert all(x > 0 for x in spec.trials(options).whole)
