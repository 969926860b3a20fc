"""Movement and uniqueness against the slow definition, one channel after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.methods.edit import gum
from lilliput.verbs.edits import EditIO, Sizes, Units


def slowly(gram: Tensor, importance: Tensor, alike: float) -> set[int]:
    kept: list[int] = []
    for i in sorted(range(len(gram)), key=lambda n: (-float(importance[n]), n)):
        cosines = [abs(float(gram[i, j])) / float(gram[i, i] * gram[j, j]) ** 0.5 for j in kept]
        if all(x <= alike for x in cosines):
            kept.append(i)
    return set(kept)


@pytest.mark.parametrize("alike", [0.1, 0.3, 0.6, 0.95])
def test_unique_channels_are_those_that_one_after_the_other_would_be(alike: float) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(20, 5, generator=draw).double() @ torch.randn(5, 60, generator=draw).double()
    importance = torch.rand(60, generator=draw).double()
    importance[7] = importance[30]
    found = gum.unique(x.T @ x, importance, alike)
    assert set(found.nonzero().flatten().tolist()) == slowly(x.T @ x, importance, alike)


def test_channels_that_never_were_active_are_unique() -> None:
    assert bool(gum.unique(torch.zeros(3, 3), torch.ones(3), 0.5).all())


def test_of_alike_channels_the_most_important_stays(scored: Any) -> None:
    draw = torch.Generator().manual_seed(2)
    slopes = {n: torch.randn(w.shape, generator=draw) for n, w in scored.weights.items()}
    x = scored.x["mlp.down_proj"]
    x[:, 9], x[:, 22] = 2.0 * x[:, 3], -x[:, 3]
    io = EditIO(scored.stats("gram"), slopes, {})
    got = gum.score(scored.view, io, gum.Options(alike=0.999))
    moved = [
        float((scored.weights["mlp.gate_proj"][j] * slopes["mlp.gate_proj"][j]).abs().sum())
        + float((scored.weights["mlp.up_proj"][j] * slopes["mlp.up_proj"][j]).abs().sum())
        + float((scored.weights["mlp.down_proj"][:, j] * slopes["mlp.down_proj"][:, j]).abs().sum())
        for j in range(40)
    ]
    best = max((3, 9, 22), key=lambda j: moved[j])
    for j, value in enumerate(got["channels.0"]):
        double = j in {3, 9, 22} - {best}
        assert value == pytest.approx(moved[j] - double * max(moved), rel=1e-5)
    kept = gum.METHOD.run([got], [Units((40,), 2, 72, 1, 1)], Sizes(1, 38), gum.Options()).channels[0, 0]
    assert set(range(40)) - set(kept) == {3, 9, 22} - {best}
