"""Scales and shifts of channels: a block computes what it did, and the folds say the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.model.block import BlockWeights
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.run.running import runner, vectors
from lilliput.stats.site import SiteStats
from lilliput.streaming.forward import Batches
from lilliput.training import equivalence
from lilliput.training.minimise import Parameter
from lilliput.verbs.view import FitBlock

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral"])
def test_any_scales_and_shifts_leave_a_block_as_it_was(tiny: Tiny, name: str) -> None:
    model = open_model(tiny(name))
    weights = BlockWeights(model, 0, model.anatomy().blocks[0])
    anatomy = weights.anatomy
    model.load_block(0)
    run = runner(model, 0, anatomy, Batches((), {}))
    layers = {x.name: Layer(x.name, weights.linear(x)) for x in anatomy.linears}
    block = FitBlock(anatomy, layers, run, vectors(model, 0))
    stats = {x.name: SiteStats(x.width, 1, square=torch.ones(x.width)) for x in anatomy.sites}
    whole = equivalence.begin(block, stats, False, 1.0)
    assert [x.link for x in whole.moves] == list(anatomy.links)
    assert any(x.shift for x in whole.moves) == (name == "gpt2")
    rng = torch.Generator().manual_seed(0)

    def drawn(p: Parameter) -> Parameter:
        return replace(p, value=torch.randn(p.value.shape, generator=rng) * 0.5)

    moves = [replace(x, log=drawn(x.log), shift=x.shift and drawn(x.shift)) for x in whole.moves]
    whole = replace(whole, moves=moves)
    moved = {}
    for linear, layer in layers.items():
        factor = whole.factor(linear)
        moved[linear] = layer.weight if factor is None else factor.apply(layer.weight)
        if factor is not None:
            part = factor.rows(3, 9).apply(layer.weight[3:9])
            assert torch.equal(part, moved[linear][3:9])
    hidden = torch.randn(1, 12, 64, generator=rng)
    with torch.no_grad():
        before, after = run({}, hidden), run(moved | whole.vectors(), hidden)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)

    weights.fold(whole.folds())
    for linear, value in moved.items():
        torch.testing.assert_close(weights.linear(anatomy.linear(linear)), value)
    for vector, value in whole.vectors().items():
        torch.testing.assert_close(weights.tensor(vector).float(), value, rtol=1e-5, atol=1e-6)
    assert {x for x in weights.names() if weights.folded(x) and x in block.vectors} == whole.vectors().keys()


def test_only_what_is_fitted_from_plain_weights_takes_part(tiny: Tiny) -> None:
    model = open_model(tiny("llama"))
    weights = BlockWeights(model, 0, model.anatomy().blocks[0])
    model.load_block(0)
    layers = {x.name: Layer(x.name, weights.linear(x)) for x in weights.anatomy.linears}
    few = {name: x for name, x in layers.items() if name != "self_attn.k_proj"}
    own = vectors(model, 0)

    def links(layers: dict[str, Layer], norms_only: bool = False) -> list[str]:
        block = FitBlock(weights.anatomy, layers, lambda weights, hidden: hidden, own)
        return [x.link.readers[0] for x in equivalence.begin(block, {}, norms_only, 1.0).moves]

    every = links(layers)
    assert {"self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"} <= set(every)
    assert links(few) == [x for x in every if x != "self_attn.q_proj"]
    assert set(links(layers, norms_only=True)) == {"self_attn.q_proj", "mlp.gate_proj"}
    with pytest.raises(PlanError, match="let: none"):
        links({"mlp.up_proj": layers["mlp.up_proj"]})
