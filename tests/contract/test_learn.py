"""What every method that chooses rotations for the whole model owes its callers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import methods
from lilliput.folds.kinds import ResidualRotation
from lilliput.model.rotated import RotatedModel
from lilliput.model.stored import Model, open_model
from lilliput.streaming import backward
from lilliput.streaming.backward import Samples
from lilliput.target import Target
from lilliput.verbs.learn import Learn
from lilliput.verbs.spec import Around

LEARN = sorted(n for n, m in methods.discover().items() if isinstance(m.spec, Learn))
IDS = torch.randint(0, 48, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(noisy: Callable[[int], Path]) -> Model:
    return open_model(str(noisy(5)))


def _targets(model: Model) -> dict[str, Target]:
    """4 bits, one scale a row, for every linear of the blocks."""
    target = Target(bits=4).model_copy(update={"group_size": -1, "scale_dtype": "float16"})
    anatomy = model.anatomy()
    return {
        f"{prefix}.{linear.name}": target
        for prefix, block in zip(anatomy.block_names, anatomy.blocks, strict=True)
        for linear in block.linears
    }


def _learn(name: str, model: RotatedModel, folder: Path, **options: Any) -> list[ResidualRotation]:
    method = methods.get(name)
    assert isinstance(method.spec, Learn)
    samples = Samples(IDS, folder) if method.spec.sequences is not None else None
    with torch.enable_grad():
        return list(method.spec.run(model, samples, _targets(model), method.parse(options)))


def _product(folds: list[ResidualRotation]) -> Tensor:
    out = torch.eye(len(folds[0].matrix), dtype=torch.float64)
    for fold in folds:
        out = out @ fold.matrix.double()
    return out


@pytest.mark.parametrize("name", LEARN)
def test_rotations_are_orthogonal_and_follow_their_seed(name: str, source: Model, tmp_path: Path) -> None:
    model = RotatedModel(source)
    ids, names = IDS.clone(), [n for n in model.skeleton.names_of(0) if n.endswith("weight")]
    held = {n: model.read(n).clone() for n in names}
    seeded = "seed" in methods.get(name).options.model_fields
    one, again, other = (
        _product(_learn(name, model, tmp_path, **({"seed": seed} if seeded else {}))) for seed in (1, 1, 2)
    )
    torch.testing.assert_close(one.T @ one, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(one, again)
    assert torch.equal(one, other) is not seeded
    assert torch.equal(IDS, ids)
    assert all(torch.equal(model.read(n), t) for n, t in held.items())
    assert [x.name for x in tmp_path.iterdir()] == [], "what spilled to disk is gone"


@pytest.mark.parametrize("name", LEARN)
def test_the_model_computes_what_it_did(name: str, source: Model, tmp_path: Path) -> None:
    model = RotatedModel(source)
    turned = model.rotated(_product(_learn(name, model, tmp_path)))
    before, after = (backward.loss(x.skeleton, x.read, Samples(IDS, tmp_path)) for x in (model, turned))
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("name", LEARN)
def test_a_model_that_can_be_turned_is_not_refused(name: str, source: Model) -> None:
    method = methods.get(name)
    assert isinstance(method.spec, Learn)
    around = Around(source.anatomy(), 24, (), _targets(source), {})
    assert method.spec.refuse is None or method.spec.refuse(around, method.parse({})) is None


@pytest.mark.parametrize("name", [n for n in LEARN if methods.get(n).spec.tokens(methods.get(n).parse({}))])
def test_what_reads_samples_says_how_many_and_reads_no_more(name: str, source: Model, tmp_path: Path) -> None:
    method = methods.get(name)
    assert isinstance(method.spec, Learn)
    assert method.spec.sequences is not None
    assert 1 <= method.spec.sequences(method.parse({}), 3) <= 3
    with pytest.raises(RuntimeError, match="samples"):
        method.spec.run(RotatedModel(source), None, _targets(source), method.parse({}))
