"""Scores of structural pruning against slow versions from the equations, and what the definitions promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.anatomy.model import Block
from lilliput.methods.edit import drop_layers, flap, group_magnitude, llm_pruner, shortened_llama
from lilliput.model.edited import heads_of
from lilliput.stats import fold
from lilliput.verbs.edits import EditIO, EditView, Sizes, Units


@pytest.fixture(scope="module")
def block(toy: Any) -> Block:
    found: Block = toy.model.anatomy().blocks[0]
    return found


@pytest.fixture(scope="module")
def weights(toy: Any, block: Block) -> dict[str, Tensor]:
    return {x.name: toy.model.read(f"model.layers.0.{x.name}.weight").double() for x in block.linears}


def view(block: Block, weights: dict[str, Tensor]) -> EditView:
    return EditView(block, lambda name: weights[name].float())


def inputs(block: Block) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        site.name: torch.randn(50, site.width, generator=draw) * torch.exp(torch.randn(site.width, generator=draw))
        + 0.3
        for site in block.sites
    }


def stats(x: dict[str, Tensor]) -> dict[str, Any]:
    return {n: fold.finish(fold.update(fold.init(v.shape[1], ("square", "mean")), v)) for n, v in x.items()}


def test_flap_is_the_variance_times_the_squared_norm_of_the_column(block: Block, weights: dict[str, Tensor]) -> None:
    seen = inputs(block)
    got = flap.score(view(block, weights), EditIO(stats(seen), {}, {}), flap.Options())
    down, o = weights["mlp.down_proj"], weights["self_attn.o_proj"]

    def fluctuation(x: Tensor, weight: Tensor, j: int) -> float:
        values = [float(v) for v in x[:, j]]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        return variance * sum(float(w) ** 2 for w in weight[:, j])

    for j, value in enumerate(got["channels.0"]):
        assert value == pytest.approx(fluctuation(seen["mlp.down_proj"], down, j), rel=1e-4)
    width = o.shape[1] // len(heads_of(block))
    for n, value in enumerate(got["heads"]):
        squares = [fluctuation(seen["self_attn.o_proj"], o, j) ** 2 for j in range(n * width, (n + 1) * width)]
        assert value == pytest.approx(sum(squares) / width, rel=1e-4)


def test_flap_drops_channels_that_never_change(block: Block, weights: dict[str, Tensor]) -> None:
    seen = inputs(block)
    seen["mlp.down_proj"][:, [2, 7]] = 5.0
    scores = flap.score(view(block, weights), EditIO(stats(seen), {}, {}), flap.Options())
    units = [Units((40,), 2, 72, 1, 1)]
    kept = flap.run([scores], units, Sizes(1, 38), flap.Options()).channels[0, 0]
    assert set(range(40)) - set(kept) == {2, 7}


def test_group_magnitude_adds_up_what_leaves_together(block: Block, weights: dict[str, Tensor]) -> None:
    got = group_magnitude.score(view(block, weights), EditIO({}, {}, {}), group_magnitude.Options())
    gate, up, down = (weights[f"mlp.{n}_proj"] for n in ("gate", "up", "down"))
    for j, value in enumerate(got["channels.0"]):
        assert value == pytest.approx(float((gate[j] ** 2).sum() + (up[j] ** 2).sum() + (down[:, j] ** 2).sum()))
    q, k, v, o = (weights[f"self_attn.{n}_proj"] for n in "qkvo")
    for n, value in enumerate(got["heads"]):
        own = slice(6 * n, 6 * n + 6)  # two heads of 6 in each half
        queries = slice(12 * n, 12 * n + 12)
        expected = (q[queries] ** 2).sum() + (k[own] ** 2).sum() + (v[own] ** 2).sum() + (o[:, queries] ** 2).sum()
        assert value == pytest.approx(float(expected))


@pytest.mark.parametrize("importance", ["element", "vector", "first", "second"])
@pytest.mark.parametrize("group", ["sum", "max", "product", "last"])
def test_llm_pruner_joins_the_importance_of_coupled_rows_and_columns(
    block: Block, weights: dict[str, Tensor], importance: Any, group: Any
) -> None:
    draw = torch.Generator().manual_seed(1)
    slopes = {n: torch.randn(w.shape, generator=draw) for n, w in weights.items()}
    squares = {n: torch.rand(w.shape, generator=draw) for n, w in weights.items()}
    options = llm_pruner.Options(importance=importance, group=group)
    got = llm_pruner.score(view(block, weights), EditIO({}, slopes, squares), options)["channels.0"]

    def of(w: Tensor, g: Tensor, f: Tensor) -> float:
        if importance == "vector":
            return abs(sum(float(a * b) for a, b in zip(w, g, strict=True)))
        total = 0.0
        for a, b, c in zip(w.tolist(), g.tolist(), f.tolist(), strict=True):
            first, second = a * b, 0.5 * a * a * c
            total += abs({"element": first - second, "first": first, "second": second}[importance])
        return total

    for j in (0, 13, 39):
        gate, up = (of(weights[n][j], slopes[n][j], squares[n][j]) for n in ("mlp.gate_proj", "mlp.up_proj"))
        down = of(*(x["mlp.down_proj"][:, j] for x in (weights, slopes, squares)))
        expected = {"sum": gate + up + down, "max": max(gate, up, down), "product": gate * up * down, "last": down}
        assert got[j] == pytest.approx(expected[group], rel=1e-5)


def test_taylor_adds_up_weights_times_gradients(block: Block, weights: dict[str, Tensor]) -> None:
    slopes = {n: torch.randn(w.shape, generator=torch.Generator().manual_seed(5)) for n, w in weights.items()}
    options = shortened_llama.Options(by="taylor")
    got = shortened_llama.score(view(block, weights), EditIO({}, slopes, {}), options)["block"][0]
    assert got == pytest.approx(sum(float((weights[n] * g).abs().sum()) for n, g in slopes.items()), rel=1e-5)


def test_blocks_leave_by_the_loss_without_them() -> None:
    units = [Units((8,), 2, 1, 1, 1)] * 5
    alone = [3.0, 1.0, 1.5, 1.2, 4.0]

    def loss(skipped: Any) -> float:  # 1 and 3 can only go one at a time
        return sum(alone[n] for n in skipped) + (10.0 if {1, 3} <= set(skipped) else 0.0)

    def left(**options: Any) -> set[int]:
        found = shortened_llama.by_loss(loss, units, Sizes(3), shortened_llama.Options(blocks=2, **options))
        assert found is not None
        return set(range(5)) - set(found.blocks)

    assert left() == {1, 2}
    assert left(greedy=False) == {1, 3}
    assert left(protect=(1,)) == {3, 2}


def test_rules_name_their_blocks() -> None:
    units = [Units((8,), 2, 1, 1, 1)] * 6
    scores = [{"block": (x,)} for x in (0.5, 0.1, 0.4, 0.05, 0.3, 0.9)]

    def left(**options: Any) -> set[int]:
        o = drop_layers.Options(blocks=2, **options)
        return set(range(6)) - set(drop_layers.run(scores, units, drop_layers.sizes(units, o), o).blocks)

    assert left(rule="contribution") == {1, 3}
    assert left(rule="contribution", protect=(3,)) == {1, 4}
    assert left(rule="top") == {4, 5}
    assert left(rule="bottom") == {0, 1}
    assert left(rule="symmetric") == {2, 3}
    assert left(rule="alternate") == {1, 4}
