"""menu against real sweeps and against a slow version written from its equations, in float64."""

from __future__ import annotations

import pytest
import torch

from lilliput.budget import menu as menus
from lilliput.methods.choose.menu import Options, drawn, score
from lilliput.methods.weight import gptq
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 64, 96
TARGETS = [menus.on(Target(scale_dtype="float16"), x) for x in ("int2/32/asym", "int3/32/asym", "int4/32", "int6/32")]


def site() -> tuple[torch.Tensor, SiteStats, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5
    x = torch.randn(3000, WIDTH, generator=draw) @ (mixed + torch.eye(WIDTH))
    weight = torch.randn(ROWS, WIDTH, generator=draw)
    cost = torch.rand(ROWS, generator=draw) + 0.1
    return weight, SiteStats(WIDTH, 3000, gram=x.T @ x), cost


def test_what_is_foreseen_is_what_the_sweep_leaves() -> None:
    weight, stats, cost = site()
    found = score(weight, stats, cost, TARGETS, Options())
    gram = stats.need("gram").double()
    for target, foreseen in zip(TARGETS, found, strict=True):
        done = gptq.compress(Layer("a", weight), stats, target, gptq.Options()).decode()
        change = (done - weight).double()
        left = ((change @ gram) * change).sum(1) @ cost.double() / gram.trace()
        assert 0.8 < foreseen / float(left) < 1.6


def test_few_rows_stand_for_all() -> None:
    weight, stats, cost = site()
    every = score(weight, stats, cost, TARGETS, Options())
    some = score(weight, stats, cost, TARGETS, Options(rows=24))
    assert some == pytest.approx(every, rel=0.15)


def test_rows_are_drawn_by_what_they_cost() -> None:
    cost = torch.tensor([0.0, 6.0, 1.0, 1.0, 0.0]).double()
    rows, weights = drawn(cost, 4)
    assert rows.tolist() == [1, 2]  # at a fourth of the whole each: three in row 1, one where the others begin
    assert weights.tolist() == [6.0, 2.0]
    assert drawn(cost, 5)[1] is cost


def test_a_menu_is_a_name_or_its_entries() -> None:
    assert menus.entries(("native",)) == menus.MENUS["native"]
    assert menus.entries(("nf4/64", "int4/32/asym")) == ("nf4/64", "int4/32/asym")
    assert menus.fields("int3/64/asym") == {"format": "int", "bits": 3, "symmetric": False, "group_size": 64}
    assert menus.fields("int8/channel")["group_size"] == -1
