"""SliceGPT's bases: principal directions at every boundary, and the function stays through the transforms between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.edit import slicegpt
from lilliput.model.rotated import RotatedModel
from lilliput.plan.plan import make
from lilliput.recipe.schema import Recipe, Step
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.verbs.edits import EditPlan


def walk(model: Any, ids: Tensor, plan: EditPlan | None = None) -> tuple[list[Tensor], Tensor]:
    """Hidden states at every boundary, and logits; an edit's transforms are applied between the blocks."""
    skeleton = model.skeleton
    with torch.no_grad():
        model.load(skeleton.embeddings)
        hidden, calls = skeleton.embed(ids)
        states = [hidden]
        for i in range(len(skeleton.block_names)):
            model.load_block(i)
            hidden = skeleton.run(i, hidden, calls)
            hidden = hidden if plan is None else hidden @ plan.transition(i).float()
            model.unload_block(i)
            states.append(hidden)
        model.load([*skeleton.final, skeleton.head])
        return states, skeleton.logits(skeleton.finish(hidden))


@pytest.fixture
def edited(toy: Any) -> EditPlan:
    ready = RotatedModel(toy.model)
    stats: dict[str, SiteStats] = {}
    for name, state in zip([*ready.skeleton.block_names, "norm"], walk(ready, toy.ids)[0], strict=True):
        flat = state / state.square().mean(-1, keepdim=True).sqrt()
        stats[name] = fold.finish(fold.update(fold.init(24, slicegpt.METHOD.needs), flat))
    return slicegpt.edit([block.groups for block in ready.anatomy().blocks], stats, slicegpt.Options())


def test_logits_stay_at_no_slicing(toy: Any, edited: EditPlan) -> None:
    with torch.no_grad():
        expected = toy.whole(input_ids=toy.ids, use_cache=False).logits
    sliced = RotatedModel(toy.model, edited.bases)
    scale = float(expected.abs().max())
    assert float((walk(sliced, toy.ids, edited)[1] - expected).abs().max()) / scale < 1e-4
    assert float((walk(sliced, toy.ids)[1] - expected).abs().max()) / scale > 1e-2, "without them it does not"


def test_each_boundary_sees_its_own_principal_directions(toy: Any, edited: EditPlan) -> None:
    assert len(edited.bases) == 4
    for q in edited.bases:
        assert q.dtype == torch.float64
        torch.testing.assert_close(q.T @ q, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-10)
    states, _ = walk(RotatedModel(toy.model, edited.bases), toy.ids, edited)
    for state in states:
        flat = (state / state.square().mean(-1, keepdim=True).sqrt()).reshape(-1, 24).double()
        gram = flat.T @ flat
        energy = gram.diagonal()
        assert float((gram - torch.diag(energy)).abs().max()) < 1e-4 * float(energy.max())
        assert bool((energy.diff() <= 1e-4 * float(energy.max())).all()), "largest first"


def test_every_boundary_needs_its_statistics(toy: Any) -> None:
    with pytest.raises(ValueError, match="4 boundaries"):
        slicegpt.edit([b.groups for b in toy.model.anatomy().blocks], {}, slicegpt.Options())


def test_recipes_are_refused_with_the_reason_and_nothing_is_claimed(toy: Any) -> None:
    assert not slicegpt.METHOD.covers
    recipe = Recipe(steps=(Step(method="slicegpt"),))
    with pytest.raises(PlanError, match="transforms that it puts between blocks have no place"):
        make(toy.model, recipe, samples=1, tokens=8, budget=None, size=None, seed=None, dtype=torch.float32)
