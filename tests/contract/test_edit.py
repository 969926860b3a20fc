"""What every method that edits the model's structure owes its callers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import methods
from lilliput.anatomy.model import Groups
from lilliput.errors import PlanError
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.target import Target
from lilliput.verbs.edit import Edit
from lilliput.verbs.edits import EditPlan
from lilliput.verbs.spec import Task

EDIT = sorted(n for n, m in methods.discover().items() if isinstance(m.spec, Edit))
WIDTH, BLOCKS = 12, 3


def _stats() -> dict[str, SiteStats]:
    """Correlated inputs of each block and of the final norm, of uneven channels."""
    draw = torch.Generator().manual_seed(0)

    def seen() -> Tensor:
        mixed = torch.randn(80, WIDTH, generator=draw) @ torch.randn(WIDTH, WIDTH, generator=draw)
        return mixed * torch.exp(torch.randn(WIDTH, generator=draw))

    return {f"place {n}": fold.finish(fold.update(fold.init(WIDTH, fold.NAMES), seen())) for n in range(BLOCKS + 1)}


def _edit(name: str, stats: dict[str, SiteStats]) -> EditPlan:
    method = methods.get(name)
    assert isinstance(method.spec, Edit)
    return method.spec.run([Groups() for _ in range(BLOCKS)], stats, method.parse({}))


@pytest.mark.parametrize("name", EDIT)
def test_inputs_are_left_alone_and_results_repeat(name: str) -> None:
    stats, kept = _stats(), _stats()
    first, again = _edit(name, stats), _edit(name, stats)
    for place, x in kept.items():
        assert all(torch.equal(stats[place].need(n), x.need(n)) for n in fold.NAMES)
    assert first.removed == again.removed
    assert len(first.bases) == len(again.bases)
    assert all(torch.equal(a, b) for a, b in zip(first.bases, again.bases, strict=True))


@pytest.mark.parametrize("name", EDIT)
def test_bases_are_orthonormal_one_for_each_place(name: str) -> None:
    found = _edit(name, _stats())
    assert len(found.bases) in (0, BLOCKS + 1)
    for basis in found.bases:
        assert basis.dtype == torch.float64
        assert basis.shape[0] == WIDTH
        eye = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-9)
    assert all(0 <= block < BLOCKS for block in found.removed)


@pytest.mark.parametrize("name", EDIT)
def test_what_is_not_sliced_passes_between_blocks_unchanged(name: str) -> None:
    """Through all transitions and back: the identity, at the limit of full width."""
    found = _edit(name, _stats())
    if not found.bases or any(basis.shape[1] < WIDTH for basis in found.bases):
        pytest.skip("it slices the residual stream")
    through = found.bases[0]
    for block in range(BLOCKS):
        through = through @ found.transition(block)
    torch.testing.assert_close(through @ found.bases[-1].T, torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EDIT)
def test_recipes_are_refused_and_the_index_says_why(name: str) -> None:
    method: Any = methods.get(name)
    task = Task(0, method, Target(), method.parse({}))
    with pytest.raises(PlanError, match=rf"step 1 \({name}\) changes the structure"):
        method.spec.ordered(task, [task])
    assert isinstance(method.recipe, str)
