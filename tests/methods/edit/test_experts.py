"""Scores of experts against loops over tokens, and what the definitions of pruning and merging promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from lilliput.errors import LilliputError, PlanError
from lilliput.methods.edit import expert_merging, expert_pruning, router_pruning
from lilliput.model.edit import experts_of
from lilliput.model.stored import Model, open_model
from lilliput.stats.routing import Routing
from lilliput.streaming.forward import embed, through
from lilliput.streaming.routing import watched
from lilliput.streaming.states import Activations
from lilliput.verbs.edits import EditIO, EditView, Sizes, Units

Tiny = Callable[[str], Path]
UNITS = [Units((64,), 4, 1, 1, 1, 64, 4, 4, 2)] * 2


def seen(model: Model, ids: torch.Tensor, folder: Path, block: int) -> Routing:
    """Statistics of a block, as a run collects them, in two batches."""
    skeleton = model.skeleton
    states = Activations(folder / "states.bin", (*ids.shape, skeleton.hidden_size), skeleton.dtype, create=True)
    with torch.no_grad():
        batches = embed(model, ids, 2, states)
        for n in range(block + 1):
            model.load_block(n)
            with watched(skeleton, n, model.anatomy().blocks[n]) as found:
                for run in through(skeleton, n, batches, states, states):
                    run()
            model.unload_block(n)
    states.delete()
    assert found is not None
    assert found.routing is not None
    return found.routing


def by_token(folder: Path, ids: torch.Tensor, block: int) -> dict[str, Any]:
    """The same sums, token by token in float64, from what transformers' own block gets."""
    plain: dict[str, Any] = {"experts_implementation": "eager"}  # the others know no float64
    whole = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plain).eval().requires_grad_(False)
    mlp = whole.model.layers[block].mlp
    inputs: list[torch.Tensor] = []
    mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        whole(input_ids=ids, use_cache=False)
    x = inputs[0].reshape(-1, inputs[0].shape[-1])
    count, top = mlp.gate.weight.shape[0], mlp.gate.top_k
    sums: dict[str, Any] = {name: [0.0] * count for name in ("chosen", "gates", "norms")}
    sums |= {"ranked": [0.0] * top, "logits": torch.zeros(count, count, dtype=torch.float64)}
    for token in x:
        scores = [float(row @ token) for row in mlp.gate.weight]
        exps = [torch.tensor(s, dtype=torch.float64).exp().item() for s in scores]
        best = sorted(range(count), key=lambda e: -scores[e])[:top]
        total = sum(exps[e] for e in best)
        for place, e in enumerate(best):
            gate = exps[e] / total
            inner, width = mlp.experts.gate_up_proj[e] @ token, mlp.experts.down_proj.shape[2]
            hidden = torch.nn.functional.silu(inner[:width]) * inner[width:]
            out = gate * (mlp.experts.down_proj[e] @ hidden)
            sums["chosen"][e] += 1.0
            sums["gates"][e] += gate
            sums["norms"][e] += sum(float(v) ** 2 for v in out) ** 0.5
            sums["ranked"][place] += gate
        for i in range(count):
            for j in range(count):
                sums["logits"][i, j] += scores[i] * scores[j]
    return {**sums, "tokens": len(x)}


@pytest.mark.parametrize(("kind", "block"), [("mixtral", 1), ("qwen3_moe", 0), ("qwen3_moe", 2)])
def test_routing_is_what_a_loop_over_tokens_finds(tiny: Tiny, tmp_path: Path, kind: str, block: int) -> None:
    ids = torch.randint(500, (3, 12), generator=torch.Generator().manual_seed(4))
    model = open_model(tiny(kind))
    expected = by_token(tiny(kind), ids, block)
    got = seen(model, ids, tmp_path, block)
    assert got.tokens == expected["tokens"]
    for name in ("chosen", "gates", "norms", "ranked"):
        torch.testing.assert_close(
            getattr(got, name), torch.tensor(expected[name], dtype=torch.float64), rtol=1e-4, atol=1e-4
        )
        assert torch.equal(got.means(name), getattr(got, name) / got.tokens)
    torch.testing.assert_close(got.logits, expected["logits"], rtol=1e-4, atol=1e-3)
    assert float(got.means("ranked").sum()) == pytest.approx(1.0)
    assert float(got.chosen.sum()) == got.tokens * len(got.ranked)


def routing() -> Routing:
    draw = torch.Generator().manual_seed(1)
    s = torch.randn(50, 4, generator=draw, dtype=torch.float64)
    s[:, 3] = 2.0 * s[:, 1] + 0.1 * s[:, 3]  # the router treats 1 and 3 alike
    chosen = torch.tensor([40.0, 35.0, 0.0, 25.0], dtype=torch.float64)
    gates = torch.tensor([10.0, 20.0, 0.0, 20.0], dtype=torch.float64)
    norms = torch.tensor([1.0, 9.0, 0.0, 30.0], dtype=torch.float64)
    return Routing(50, chosen, gates, norms, torch.tensor([35.0, 15.0], dtype=torch.float64), s.T @ s)


@pytest.mark.parametrize(("by", "kept"), [("share", (0, 1)), ("gate", (1, 3)), ("output", (1, 3))])
def test_experts_that_are_used_least_leave(tiny: Tiny, by: Any, kept: tuple[int, ...]) -> None:
    block = open_model(tiny("mixtral")).anatomy().blocks[0]
    o = expert_pruning.Options(by=by, experts=2)
    scores = expert_pruning.score(
        EditView(block, lambda n: torch.empty(0)), EditIO({}, {}, {}, None, routing=routing()), o
    )
    found = expert_pruning.METHOD.run([scores, scores], UNITS, expert_pruning.fewer(UNITS, o), o)
    assert found.experts == {0: kept, 1: kept}
    assert expert_pruning.score(EditView(block, lambda n: torch.empty(0)), EditIO({}, {}, {}), o) == {}


def test_experts_join_the_one_that_their_router_treats_alike(tiny: Tiny) -> None:
    block = open_model(tiny("mixtral")).anatomy().blocks[0]
    assert len(experts_of(block)) == 4
    o = expert_merging.Options(experts=2)
    used = routing()
    scores = expert_merging.score(EditView(block, lambda n: torch.empty(0)), EditIO({}, {}, {}, None, routing=used), o)
    found = expert_merging.run([scores, scores], UNITS, Sizes(2, experts=2), o)
    assert found.experts == {0: (0, 1), 1: (0, 1)}
    first, second = found.merged[0]
    assert dict(second)[3] == pytest.approx(25 / 60)
    assert dict(second)[1] == pytest.approx(35 / 60)
    assert sum(share for _, share in first) == pytest.approx(1.0)
    assert {e for group in found.merged[0] for e, _ in group} == {0, 1, 2, 3}
    assert dict(first + second)[2] == 0.0


def test_rows_of_the_router_are_compared_by_their_angle(tiny: Tiny) -> None:
    block = open_model(tiny("mixtral")).anatomy().blocks[0]
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.1], [3.0, 0.3]])
    o = expert_merging.Options(experts=2, by="rows")
    scores = expert_merging.score(EditView(block, lambda n: rows), EditIO({}, {}, {}, None, routing=routing()), o)
    alike = torch.tensor(scores["experts.alike"], dtype=torch.float64).view(4, 4)
    assert float(alike[0, 3]) == pytest.approx(3.0 / (9.09**0.5))
    assert float(alike[0, 1]) == 0.0
    found = expert_merging.run([scores], UNITS[:1], Sizes(1, experts=2), o)
    assert [[e for e, _ in group] for group in found.merged[0]] == [[0, 3], [1, 2]]


def test_a_group_that_nothing_uses_counts_alike() -> None:
    ((first, second),) = expert_merging.grouped((0.0, 0.0), (1.0, 0.5, 0.5, 1.0), (0,))
    assert (first, second) == ((0, 0.5), (1, 0.5))


def test_the_weights_that_stay_with_fewer_experts_are_measured(tiny: Tiny) -> None:
    block = open_model(tiny("mixtral")).anatomy().blocks[0]
    o = router_pruning.Options(top_k=1, keep=0.7)
    scores = router_pruning.score(
        EditView(block, lambda n: torch.empty(0)), EditIO({}, {}, {}, None, routing=routing()), o
    )
    assert scores["gates"] == pytest.approx((0.7, 0.3))
    assert router_pruning.mass([scores, {}, scores], 1) == pytest.approx(0.7)
    assert router_pruning.run([scores, scores], UNITS, Sizes(2, top_k=1), o).top_k == 1
    with pytest.raises(LilliputError, match=r"0\.700 of the routers' weights stay.*larger top_k"):
        router_pruning.run([scores], UNITS[:1], Sizes(1, top_k=1), router_pruning.Options(keep=0.9))


def test_numbers_of_experts_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="there are 4"):
        expert_pruning.fewer(UNITS, expert_pruning.Options(experts=5))
    with pytest.raises(PlanError, match="no experts"):
        expert_pruning.fewer([Units((8,), 2, 1, 1, 1)], expert_pruning.Options())
    with pytest.raises(PlanError, match="each token uses 2"):
        router_pruning.sizes(UNITS, router_pruning.Options(top_k=3))
    assert expert_pruning.fewer(UNITS, expert_pruning.Options(ratio=0.5)).experts == 2
    assert expert_pruning.fewer(UNITS, expert_pruning.Options(ratio=0.9)).experts == 1
