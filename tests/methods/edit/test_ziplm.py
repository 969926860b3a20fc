"""Orders of removal with their errors, and widths that differ by block against every combination."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.edit import ziplm
from lilliput.verbs.edits import EditIO, Sizes, Units


def slowly(weight: Tensor, gram: Tensor, size: int, damping: float) -> list[float]:
    """Scores of all units: whatever leaves next is tried, with the weights that stay changed for each trial."""
    matrix = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    scores = [0.0] * (len(gram) // size)
    gone: list[int] = []
    while len(gone) < len(gram):
        errors = {}
        for n in range(len(scores)):
            if n * size in gone:
                continue
            out = gone + list(range(n * size, n * size + size))
            kept = [j for j in range(len(gram)) if j not in out]
            fitted = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ weight.T).T if kept else weight[:, :0]
            miss = weight.clone()
            miss[:, kept] -= fitted
            errors[n] = float((miss @ matrix * miss).sum())
        best = min(errors, key=lambda n: errors[n])
        scores[best] = errors[best] / float((weight @ matrix * weight).sum())
        gone += range(best * size, best * size + size)
    return scores


def test_scores_are_errors_of_greedy_removal(scored: Any) -> None:
    options = ziplm.Options(kinds=("channel", "head"))
    got = ziplm.score(scored.view, EditIO(scored.stats("gram"), {}, {}), options)
    for key, name, size in (("heads", "self_attn.o_proj", 12), ("channels.0", "mlp.down_proj", 1)):
        expected = slowly(scored.weights[name], scored.gram(name), size, 0.01)
        assert got[key] == pytest.approx(expected, rel=1e-3)
    assert set(ziplm.score(scored.view, EditIO(scored.stats("gram"), {}, {}), ziplm.Options())) == {"channels.0"}


def test_of_two_channels_that_do_the_same_one_leaves_for_nothing(scored: Any) -> None:
    x = scored.x["mlp.down_proj"]
    x[:, 11] = 3.0 * x[:, 5]
    got = ziplm.score(scored.view, EditIO(scored.stats("gram"), {}, {}), ziplm.Options(damping=1e-6))["channels.0"]
    first, second = sorted((got[5], got[11]))
    assert first == min(got)
    assert first < 1e-4 < second
    kept = ziplm.run([{"channels.0": got}], [Units((40,), 2, 72, 1, 1)], Sizes(1, 39), ziplm.Options()).channels[0, 0]
    assert len({5, 11} & set(kept)) == 1


@pytest.mark.parametrize("limit", [9, 11, 17, 30])
def test_widths_are_those_that_every_combination_would_show(limit: int) -> None:
    draw = torch.Generator().manual_seed(limit)
    errors = [ziplm.by_width(torch.rand(4, generator=draw).tolist()) for _ in range(4)]
    times = [{width: 1 + width + int(torch.randint(3, (1,), generator=draw)) for width in x} for x in errors]
    found, error = ziplm.widths(errors, times, limit)
    every = [
        sum(errors[n][w] for n, w in enumerate(picked))
        for picked in product(range(5), repeat=4)
        if sum(times[n][w] for n, w in enumerate(picked)) <= limit
    ]
    assert sum(times[n][w] for n, w in enumerate(found)) <= limit
    assert error == pytest.approx(min(every), rel=1e-12)
    assert sum(errors[n][w] for n, w in enumerate(found)) == pytest.approx(error)


def test_a_limit_that_no_widths_keep_is_refused() -> None:
    with pytest.raises(PlanError, match="the quickest take 6: allow more time"):
        ziplm.widths([{0: 1.0, 1: 0.0}] * 2, [{0: 3, 1: 5}] * 2, 5)


def test_errors_by_width_grow_as_units_leave() -> None:
    assert ziplm.by_width([0.4, 0.1, 0.9]) == {3: 0.0, 2: 0.1, 1: 0.4, 0: 0.9}


def test_blocks_of_their_own_widths_lose_least_at_as_many_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    units = [Units((8,), 3, 5, 12, 100)] * 3
    sizes = Sizes(3, 4, 2, spread=True, multiple=2)

    def grown(count: int, scale: float) -> tuple[float, ...]:
        left = (torch.rand(count, generator=draw) * scale).cumsum(0)
        return tuple(left[torch.randperm(count, generator=draw)].tolist())

    scores = [{"heads": grown(3, 1.0), "channels.0": grown(8, 0.1 + n)} for n in range(3)]

    def error(values: Any, kept: int) -> float:
        return ([0.0, *sorted(values)])[len(values) - kept]

    every = []
    for picked in product(product((1, 2, 3), (2, 4, 6, 8)), repeat=3):
        if sum(12 * h + 5 * c for h, c in picked) <= 3 * (2 * 12 + 4 * 5):
            lost = [error(s["heads"], h) + error(s["channels.0"], c) for s, (h, c) in zip(scores, picked, strict=True)]
            every.append(sum(lost))
    found = ziplm.run(scores, units, sizes, ziplm.Options())
    lost = sum(error(scores[n]["heads"], len(x)) for n, x in found.heads.items())
    lost += sum(error(scores[n]["channels.0"], len(x)) for (n, _), x in found.channels.items())
    assert lost == pytest.approx(min(every), rel=1e-12)
    assert len({len(x) for x in found.channels.values()}) > 1
    assert all(len(x) % 2 == 0 for x in found.channels.values())
    kept = sum(12 * len(x) for x in found.heads.values()) + sum(5 * len(x) for x in found.channels.values())
    assert kept <= 3 * (2 * 12 + 4 * 5)
    for n, stays in found.heads.items():
        gone = set(range(3)) - set(stays)
        assert all(scores[n]["heads"][a] < scores[n]["heads"][b] for a in gone for b in stays)
