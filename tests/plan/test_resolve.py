"""What a recipe makes of its targets, and which steps cannot follow each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.model.stored import Model, open_model
from lilliput.plan.plan import Plan, make
from lilliput.recipe.schema import Recipe, Step

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    return open_model(str(tiny("llama")))


def plan(model: Model, *steps: dict[str, Any]) -> Plan:
    recipe = Recipe(steps=tuple(Step.model_validate(x) for x in steps))
    room: dict[str, Any] = {"samples": 2, "tokens": 16, "budget": None, "size": None, "seed": None}
    return make(model, recipe, dtype=torch.float32, measured=False, **room)


def test_a_step_without_a_target_gets_its_methods_own(model: Model) -> None:
    def target(**named: Any) -> Any:
        made = plan(model, {"method": "svd-truncate", "target": named})
        return made.resolved.linears[0].tasks[0].target

    assert (target().rank, target().ratio) == (None, 0.8)
    assert (target(rank=5).rank, target(rank=5).ratio) == (5, None)
    assert (target(ratio=0.5).rank, target(ratio=0.5).ratio) == (None, 0.5)
    both = plan(model, {"method": "loftq", "target": {"bits": 3}}).resolved.linears[0].tasks[0].target
    assert (both.bits, both.rank) == (3, 16)


def test_layers_that_factors_would_enlarge_stay_and_the_plan_says_so(model: Model) -> None:
    made = plan(model, {"method": "svd-truncate", "target": {"rank": 30}})
    # [64, 64] breaks even at 32, [32, 64] at 22, [128, 64] at 43.
    stays = [x.name for x in made.resolved.linears if not x.scheme.parts]
    assert stays
    assert all(name.endswith(("k_proj", "v_proj")) for name in stays)
    assert made.to_json()["formats"] == {"rank 30 (float16)": 20, "dense": 8}
    assert any("20 linears are products of two factors and run as two thin products." in x for x in made.notes)
    assert not any("is decoded for its forward pass" in x for x in made.notes)
    (note,) = (x for x in made.notes if "are left unchanged" in x)
    assert note.startswith("8 linears are left unchanged: two factors")
    assert "model.layers.0.self_attn.k_proj" in note
    assert not any("are left unchanged" in x for x in plan(model, {"method": "svd-truncate"}).notes)


@pytest.mark.parametrize("method", ["svd-truncate", "loftq", "lplr"])
def test_nothing_fills_the_zeros_of_an_earlier_step(model: Model, method: str) -> None:
    with pytest.raises(PlanError, match=rf"step 2 \({method}\) on .* it would fill the zeros"):
        plan(model, {"method": "wanda"}, {"method": method, "target": {"rank": 4}})
    apart = ({"method": "wanda", "where": {"include": ["*mlp*"]}}, {"method": method, "where": {"include": ["*attn*"]}})
    assert plan(model, *apart).bytes > 0


def test_ranks_that_no_layer_can_have_name_the_layer_and_the_most(model: Model) -> None:
    with pytest.raises(PlanError, match=r"rank 40 of a \[32, 64\] linear: give 1 to 32"):
        plan(model, {"method": "gptq"}, {"method": "eora", "target": {"rank": 40}})
    with pytest.raises(PlanError, match="no rank is left"):
        plan(model, {"method": "svd-truncate", "target": {"ratio": 0.01}})


def test_no_other_step_may_touch_what_laser_leaves(model: Model) -> None:
    laser = {"method": "laser", "where": {"include": ["*.1.mlp.up_proj"]}}
    for other in ({"method": "rtn"}, {"method": "magnitude"}):
        for steps in ((laser, other), (other, laser)):
            with pytest.raises(PlanError, match=r"\(laser\) on model\.layers\.1\.mlp\.up_proj leaves a plain weight"):
                plan(model, *steps)
    apart = {"method": "rtn", "where": {"exclude": ["lm_head", "*.1.mlp.up_proj"]}}
    assert plan(model, laser, apart).bytes > 0


def test_decompositions_in_float64_count_as_memory(model: Model) -> None:
    assert plan(model, {"method": "svd-truncate"}).batching.bytes >= plan(model, {"method": "magnitude"}).batching.bytes


@pytest.mark.parametrize(("weighting", "lost"), [("absmean", "single inputs"), ("fisher", "squared gradients")])
def test_what_a_turned_layer_does_not_have_cannot_be_read(model: Model, weighting: str, lost: str) -> None:
    later = {"method": "svd-truncate", "options": {"weighting": weighting}}
    with pytest.raises(PlanError, match=rf"step 2 \(svd-truncate\) on .*it reads .*{lost}"):
        plan(model, {"method": "quip"}, later)
    assert plan(model, {"method": "quip"}, {**later, "options": {"weighting": "gram"}}).bytes > 0


@pytest.mark.parametrize("method", ["rtn", "loftq", "codebook", "squeezellm", "quantile-quant"])
def test_no_method_takes_a_codebook_larger_than_its_data(model: Model, method: str) -> None:
    with pytest.raises(PlanError, match="256 levels for every 16 weights"):
        plan(model, {"method": method, "target": {"format": "codebook", "bits": 8, "group_size": 16}})


def test_a_step_that_refines_zeros_has_the_target_of_the_step_that_made_them(model: Model) -> None:
    pruning = {"method": "sparsegpt", "target": {"pattern": "2:4"}}
    for method in ("dsnot", "admm-update"):
        found = plan(model, pruning, {"method": method}, {"method": "gptq", "target": {"bits": 4}}).resolved.linears[0]
        assert [task.target.pattern for task in found.tasks[:2]] == ["2:4", "2:4"]
        assert (found.sparsity, found.pattern) == (0.5, "2:4")
    resolved = plan(model, {"method": "owl"}, {"method": "sparsegpt"}, {"method": "admm-update"}).resolved
    (allocating,) = (task for task in resolved.tasks if task.method.name == "owl")
    name = resolved.linears[0].name
    governed = resolved.governed(allocating)
    assert governed[name].method.name == "sparsegpt"
    divided = governed[name].target.model_copy(update={"sparsity": 0.6})
    changed = resolved.with_targets(allocating, {name: divided}).linears[0]
    assert [task.target.sparsity for task in changed.tasks] == [0.6, 0.6]
    assert changed.sparsity == 0.6
