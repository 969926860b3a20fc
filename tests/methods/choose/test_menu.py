"""menu against real sweeps and against a slow version written from its equations, in float64."""

from __future__ import annotations

import pytest
import torch

from lilliput.budget import menu as menus
from lilliput.errors import PlanError
from lilliput.formats.known import from_target
from lilliput.methods.choose.menu import Options, drawn, score
from lilliput.methods.weight import gptq, quip
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target

ROWS, WIDTH = 64, 96
TARGETS = [menus.on(Target(scale_dtype="float16"), x) for x in ("int2/32/asym", "int3/32/asym", "int4/32", "int6/32")]


def site() -> tuple[torch.Tensor, SiteStats, torch.Tensor]:
    """A weight, the statistics of correlated inputs, and weights of its rows."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(WIDTH, WIDTH, generator=draw) / WIDTH**0.5
    x = torch.randn(3000, WIDTH, generator=draw) @ (mixed + torch.eye(WIDTH))
    weight = torch.randn(ROWS, WIDTH, generator=draw)
    cost = torch.rand(ROWS, generator=draw) + 0.1
    return weight, SiteStats(WIDTH, 3000, gram=x.T @ x), cost


def left(layer: Layer, gram: torch.Tensor, rows: torch.Tensor | None = None) -> float:
    """tr(D G DT), rows weighed."""
    change = (layer.decode() - layer.weight).double()
    each = ((change @ gram.double()) * change).sum(1)
    return float(each.sum() if rows is None else each @ rows.double())


def test_what_is_foreseen_is_what_the_sweep_leaves() -> None:
    weight, stats, rows = site()
    for weights in (None, rows):
        found = score(weight, stats, TARGETS, weights, Options())
        for target, foreseen in zip(TARGETS, found, strict=True):
            done = gptq.compress(Layer("a", weight), stats, target, gptq.Options())
            assert 0.8 < foreseen / left(done, stats.need("gram"), weights) < 1.6


def test_what_is_foreseen_of_turned_codes_is_what_their_sweep_leaves() -> None:
    weight, stats, _ = site()
    targets = [menus.on(Target(scale_dtype="float16"), x) for x in ("trellis2", "trellis-half2", "trellis3")]
    found = score(weight, stats, targets, None, Options())
    for target, foreseen in zip(targets, found, strict=True):
        done = quip.compress(Layer("a", weight), stats, target, quip.Options(diagonal=False))
        assert 0.7 < foreseen / left(done, stats.need("gram")) < 1.4


def test_few_rows_stand_for_all() -> None:
    weight, stats, _ = site()
    every = score(weight, stats, TARGETS, None, Options())
    some = score(weight, stats, TARGETS, None, Options(rows=24))
    assert some == pytest.approx(every, rel=0.15)


def test_rows_are_drawn_by_their_energy() -> None:
    weight = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    rows, stand_for = drawn(weight, None, 3)
    assert rows.tolist() == [1, 2]  # at a sixth, half and five sixths of the summed energy, 6
    assert stand_for.tolist() == [1.0, 2.0]
    weights = torch.tensor([1.0, 0.0, 4.0, 0.0])
    assert drawn(weight, weights, 3)[0].tolist() == [2]
    assert drawn(weight, None, 4)[1].tolist() == [1.0] * 4


def test_a_menu_is_a_name_or_its_entries() -> None:
    assert menus.entries(("native",)) == menus.MENUS["native"]
    assert menus.entries(("nf4/64", "int4/32/asym")) == ("nf4/64", "int4/32/asym")
    assert menus.fields("int3/64/asym") == {"format": "int", "bits": 3, "symmetric": False, "group_size": 64}
    assert menus.fields("int8/channel")["group_size"] == -1
    assert menus.fields("int3/32/asym/int6")["scale_dtype"] == "int6/row"
    assert menus.fields("trellis-half2") == {"format": "trellis-half", "bits": 2, "symmetric": True, "group_size": 0}
    with pytest.raises(PlanError, match="no kind of scales"):
        menus.fields("int3/64/float8")


def test_every_entry_of_every_menu_is_a_grid() -> None:
    for name, entries in menus.MENUS.items():
        assert len(set(entries)) == len(entries)
        menus.check(entries, "gguf" if name == "gguf" else None)
        for entry in entries:
            assert from_target(menus.on(Target(scale_dtype="float16", group_size=32), entry)).describe()
    with pytest.raises(PlanError, match="no engine holds the menu"):
        menus.check(("q4_0", "nf4/64"), "gguf")
