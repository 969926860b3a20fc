"""The random rotation: orthogonal, reproducible, and it spreads channels that stand out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.methods.learn import hadamard
from lilliput.model.rotated import RotatedModel
from lilliput.plan.plan import make
from lilliput.recipe.schema import Recipe, Step
from lilliput.run.editing import prepared
from lilliput.verbs.spec import Around


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_rotations_are_orthogonal_and_follow_their_seed(toy: Any, kind: str) -> None:
    model = RotatedModel(toy.model)
    one, again, other = (
        hadamard.learn(model, None, {}, hadamard.Options(kind=kind, seed=seed))[0].matrix for seed in (1, 1, 2)
    )
    assert one.dtype == torch.float64
    torch.testing.assert_close(one.T @ one, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_hadamard_matrix_leaves_no_channel_standing_out(toy: Any) -> None:
    model = RotatedModel(toy.model)
    turned = model.rotated(hadamard.learn(model, None, {}, hadamard.Options())[0].matrix)
    name = "model.layers.2.self_attn.q_proj.weight"  # its norm's gain has one channel twenty times the others
    before, after = (m.read(name).square().sum(0) for m in (model, turned))
    assert float(before.max() / before.mean()) > 10
    assert float(after.max() / after.mean()) < 3


def test_a_width_without_a_transform_is_refused_with_the_way_out(toy: Any) -> None:
    def around(width: int) -> Around:
        return Around(toy.model.anatomy(), width, (), {}, {})

    assert hadamard.refuse(around(24), hadamard.Options()) is None
    assert "hadamard.kind=orthogonal" in (hadamard.refuse(around(28), hadamard.Options()) or "")
    assert hadamard.refuse(around(28), hadamard.Options(kind="orthogonal")) is None


def test_rotations_come_first(toy: Any) -> None:
    recipe = Recipe(steps=(Step(method="smoothquant"), Step(method="hadamard"), Step(method="rtn")))
    with pytest.raises(PlanError, match="move it in front of step 1"):
        make(
            prepared(toy.model, recipe), recipe, samples=1, tokens=8, budget=None, size=None, seed=None,
            dtype=torch.float32,
        )  # fmt: skip
