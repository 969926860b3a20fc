"""mixed against the two methods between which the grid decides."""

from __future__ import annotations

import pytest
import torch

from lilliput import methods
from lilliput.budget import menu
from lilliput.methods.weight import gptq, mixed, quip
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.compress import Compress


def _case() -> tuple[Layer, SiteStats]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=draw) @ torch.randn(32, 32, generator=draw)
    return Layer("a", torch.randn(24, 32, generator=draw)), SiteStats(32, 400, gram=x.T @ x)


@pytest.mark.parametrize("entry", ["int3/16/asym", "nf4/16", "int4/16"])
def test_a_grid_with_groups_is_gptq_s(entry: str) -> None:
    layer, stats = _case()
    target = menu.on(Target(scale_dtype="float16"), entry)
    done = mixed.compress(layer, stats, target, mixed.Options())
    assert torch.equal(done.decode(), gptq.compress(layer, stats, target, gptq.Options()).decode())
    assert not done.inputs


@pytest.mark.parametrize("entry", ["trellis2", "trellis-half2"])
def test_a_code_along_columns_is_quip_s(entry: str) -> None:
    layer, stats = _case()
    target = menu.on(Target(scale_dtype="float16"), entry)
    done = mixed.compress(layer, stats, target, mixed.Options())
    assert torch.equal(done.decode(), quip.compress(layer, stats, target, quip.Options(diagonal=False)).decode())
    assert len(done.inputs) == len(done.outputs) == 1


def test_linears_of_a_site_are_stacked_unless_their_outputs_are_turned() -> None:
    spec = methods.get("mixed").spec
    assert isinstance(spec, Compress)
    assert spec.stacks(menu.on(Target(), "int4/32"), mixed.Options())
    assert not spec.stacks(menu.on(Target(), "trellis3"), mixed.Options())
