import pytest
import torch

from lilliput.algebra import masks
from lilliput.errors import LilliputError, PlanError


def test_the_largest_stay_and_the_earlier_of_equals() -> None:
    score = torch.tensor([[3.0, 1.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    want = [[1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert masks.largest(score, 2).int().tolist() == want
    assert not bool(masks.largest(score, 0).any())
    assert bool(masks.largest(score, 4).all())


def test_equals_a_stable_sort() -> None:
    score = torch.randint(0, 9, (50, 40), generator=torch.Generator().manual_seed(0)).float()
    for keep in (1, 13, 39):
        want = torch.zeros(50, 40, dtype=torch.bool)
        want.scatter_(1, score.argsort(dim=1, descending=True, stable=True)[:, :keep], True)
        assert torch.equal(masks.largest(score, keep), want)


def test_scopes_and_patterns() -> None:
    score = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).abs()
    layer = masks.choose(score, 0.4, None, "layer")
    assert int(layer.sum()) == 96 - round(0.4 * 96)
    assert float(score[layer].min()) > float(score[~layer].max())
    row = masks.choose(score, 0.4, None, "row")
    assert row.sum(1).tolist() == [12 - round(0.4 * 12)] * 8
    pattern = masks.choose(score, None, "1:3", "row")
    assert bool((pattern.view(8, 4, 3).sum(2) == 1).all())
    # A pattern as wide as the row is the row scope; a wider window keeps at least as much score.
    assert torch.equal(masks.choose(score, None, "6:12", "row"), masks.choose(score, 0.5, None, "row"))
    kept = [float((score * masks.choose(score, None, p, "row")).sum()) for p in ("1:2", "2:4", "6:12")]
    assert kept == sorted(kept)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="2:5 does not divide a width of 12"):
        masks.choose(torch.ones(2, 12), None, "2:5", "row")
    with pytest.raises(PlanError, match="sparsity"):
        masks.choose(torch.ones(2, 12), None, None, "row")
    for value in (float("nan"), float("inf")):
        with pytest.raises(LilliputError, match="NaN"):
            masks.largest(torch.tensor([[1.0, value, 2.0]]), 1)


def test_short_columns_keep_their_most_and_the_earlier_of_equals() -> None:
    score = torch.randint(0, 4, (6, 300), generator=torch.Generator().manual_seed(4)).float()
    for keep in range(7):
        assert torch.equal(masks.most(score, keep), masks.largest(score.T.contiguous(), keep).T)
