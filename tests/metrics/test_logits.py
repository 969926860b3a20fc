import math

import pytest
import torch

from lilliput.errors import SourceError
from lilliput.metrics.logits import score

WINDOWS, TOKENS, VOCABULARY = 3, 21, 50


class Table:
    """A head whose logits are given: float32 [windows, tokens, vocabulary]."""

    def __init__(self, values, name="table"):
        self.values, self.name, self.vocabulary = values, name, values.shape[-1]
        self.slice = None

    def load(self, start, stop):
        assert self.slice is None, "the last slice must be unloaded first"
        self.slice = (start, stop)

    def logits(self, window, start, stop, first, last):
        assert self.slice[0] <= first < last <= self.slice[1]
        return self.values[window, start:stop, first:last].clone()

    def unload(self):
        self.slice = None


def random_table(seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(WINDOWS, TOKENS, VOCABULARY, generator=generator)


def ids(seed=9):
    return torch.randint(0, VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(seed))


def reference_scores(ours, theirs):
    targets = ids()[:, 1:, None]
    p, q = torch.log_softmax(ours.double(), -1)[:, :-1], torch.log_softmax(theirs.double(), -1)[:, :-1]
    divergence = (q.exp() * (q - p)).sum(-1)
    same = p.argmax(-1) == q.argmax(-1)
    return -p.gather(-1, targets)[..., 0], -q.gather(-1, targets)[..., 0], divergence, same


@pytest.mark.parametrize(
    ("columns", "rows", "tile"),
    [(50, 64, 50), (50, 7, 50), (50, 1, 8), (17, 20, 17), (17, 20, 6), (1, 64, 9), (999, 5, 999), (999, 5, 49)],
)
def test_slices_and_tiles_give_what_the_whole_matrix_gives(columns, rows, tile):
    ours, theirs = random_table(0), random_table(0) + 0.5 * random_table(1)
    nll, reference, divergence, same = reference_scores(ours, theirs)
    found = score(ids(), Table(ours), Table(theirs), columns=columns, rows=rows, tile=tile)
    assert torch.allclose(found.nll, nll, atol=1e-6)
    assert torch.allclose(found.reference, reference, atol=1e-6)
    assert torch.allclose(found.divergence, divergence, atol=1e-5)
    assert torch.equal(found.same, same)
    assert 0 < int(same.sum()) < same.numel()
    assert torch.allclose(score(ids(), Table(ours), columns=columns, rows=rows, tile=tile).nll, nll, atol=1e-6)


def test_uniform_model_scores_the_log_of_its_vocabulary():
    found = score(ids(), Table(torch.full((WINDOWS, TOKENS, VOCABULARY), 5.0)), columns=11)
    assert torch.allclose(found.nll, torch.full_like(found.nll, math.log(VOCABULARY)), atol=1e-6)
    assert found.divergence is None
    assert found.same is None


@pytest.mark.parametrize("columns", [VOCABULARY, 13])
def test_a_model_against_itself_is_exactly_equal(columns):
    table = random_table(2, scale=30.0)
    found = score(ids(), Table(table), Table(table.clone()), columns=columns)
    assert torch.equal(found.nll, found.reference)
    assert bool((found.divergence == 0).all())
    assert bool(found.same.all())


def test_large_logits_do_not_overflow():
    ours, theirs = random_table(3) + 500.0, random_table(4) - 500.0
    nll, reference, divergence, _ = reference_scores(ours, theirs)
    found = score(ids(), Table(ours), Table(theirs), columns=20)
    # float32 logits of size 500 are known to 3e-5 only.
    assert torch.allclose(found.nll, nll, atol=2e-4)
    assert torch.allclose(found.reference, reference, atol=2e-4)
    assert torch.allclose(found.divergence, divergence, atol=1e-3)


def test_small_divergence_keeps_its_digits():
    ours = random_table(5)
    theirs = ours + 0.01 * random_table(6, scale=1.0)
    _, _, divergence, _ = reference_scores(ours, theirs)
    found = score(ids(), Table(ours), Table(theirs), columns=VOCABULARY)
    assert float(divergence.mean()) < 1e-4
    assert torch.allclose(found.divergence, divergence, atol=1e-6)
    assert float(found.divergence.mean()) == pytest.approx(float(divergence.mean()), rel=1e-2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", ["model", "reference"])
def test_bad_logits_are_named(value, broken):
    good, bad = random_table(7), random_table(8)
    bad[1, 13, 44] = value
    heads = (Table(bad, "broken"), Table(good)) if broken == "model" else (Table(good), Table(bad, "broken"))
    with pytest.raises(SourceError, match="'broken' gives logits that are not finite, first in window 1 at token 13"):
        score(ids(), *heads, columns=20, rows=8)
    assert heads[0].slice is heads[1].slice is None


@pytest.mark.parametrize(("columns", "tile"), [(50, 50), (50, 8), (17, 6)])
def test_streams_share_one_look_at_the_reference(columns, tile):
    tables = [random_table(seed) for seed in (10, 11, 12)]
    theirs = Table(random_table(13))
    asked = []
    inner = theirs.logits
    theirs.logits = lambda *at: (asked.append(at), inner(*at))[1]
    alone = [score(ids(), Table(x), theirs, columns=columns, tile=tile) for x in tables]
    once = len(asked) // len(tables)
    asked.clear()
    found = score(ids(), Table(torch.cat(tables)), theirs, columns=columns, tile=tile, streams=3)
    assert len(asked) == once
    for at, one in enumerate(alone):
        part = found.of(slice(at * WINDOWS, (at + 1) * WINDOWS), slice(None))
        assert all(torch.equal(x, y) for x, y in zip(vars(part).values(), vars(one).values(), strict=True))
