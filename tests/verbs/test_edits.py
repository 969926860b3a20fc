"""How much of each block stays: alike in all, or as the scores of the whole model say."""

from __future__ import annotations

import pytest
import torch

from lilliput.errors import LilliputError, PlanError
from lilliput.verbs.edits import (
    EditScores,
    Sizes,
    Thinning,
    Units,
    best_units,
    heads_left,
    spread_units,
    thinned,
    thinner,
)

BLOCKS, WIDTH, HEADS = 5, 32, 4
UNITS = [Units((WIDTH,), HEADS, 30, 400, WIDTH * 30 + HEADS * 400) for _ in range(BLOCKS)]


def scores(seed: int) -> list[EditScores]:
    draw = torch.Generator().manual_seed(seed)
    level = 1 + torch.rand(BLOCKS, generator=draw)
    return [
        {
            "channels.0": tuple((level[n] * torch.rand(WIDTH, generator=draw)).tolist()),
            "heads": tuple((10 * level[n] * torch.rand(HEADS, generator=draw)).tolist()),
        }
        for n in range(BLOCKS)
    ]


def weights(edit: object) -> int:
    channels, heads = edit.channels, edit.heads  # type: ignore[attr-defined]
    return sum(30 * len(x) for x in channels.values()) + sum(400 * len(x) for x in heads.values())


@pytest.mark.parametrize("seed", range(5))
def test_channels_leave_in_the_order_of_their_worth_for_their_weights(seed: int) -> None:
    sizes = thinned(UNITS, Thinning(ratio=0.2, multiple=1, uniform=False))
    edit = best_units(scores(seed), UNITS, sizes)
    worth = sorted((x, n, j) for n, s in enumerate(scores(seed)) for j, x in enumerate(s["channels.0"]))
    stays = worth[len(worth) - BLOCKS * (sizes.channels or 0) :]
    for n in range(BLOCKS):
        assert edit.channels[n, 0] == tuple(sorted(j for _, m, j in stays if m == n))


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("seed", range(5))
def test_as_many_weights_stay_as_with_equal_widths(seed: int, multiple: int) -> None:
    even = thinned(UNITS, Thinning(ratio=0.3, kinds=("channel", "head"), multiple=multiple))
    uneven = thinned(UNITS, Thinning(ratio=0.3, kinds=("channel", "head"), multiple=multiple, uniform=False))
    edit = best_units(scores(seed), UNITS, uneven)
    assert all(len(x) % multiple == 0 and x for x in edit.channels.values())
    assert all(edit.heads.values())
    assert abs(weights(edit) - weights(best_units(scores(seed), UNITS, even))) <= 30 * multiple
    assert edit.spread


def test_a_block_that_nobody_needs_keeps_one_multiple_and_one_head() -> None:
    low = scores(0)
    low[2] = {key: (0.0,) * len(x) for key, x in low[2].items()}
    sizes = thinned(UNITS, Thinning(ratio=0.4, kinds=("channel", "head"), uniform=False))
    edit = best_units(low, UNITS, sizes)
    assert len(edit.channels[2, 0]) == 8
    assert len(edit.heads[2]) == 1


def test_scores_may_count_as_they_are() -> None:
    sizes = Sizes(BLOCKS, 16, HEADS, spread=True)
    each = [{"channels.0": (1.0,) * WIDTH, "heads": (2.0,) * HEADS} for _ in range(BLOCKS)]
    assert all(len(x) == HEADS for x in spread_units(each, UNITS, sizes, per_weight=False).heads.values())
    assert any(len(x) < HEADS for x in spread_units(each, UNITS, sizes, per_weight=True).heads.values())


def test_what_cannot_be_divided_is_refused() -> None:
    experts = [Units((WIDTH, WIDTH), HEADS, 30, 400, 4000) for _ in range(BLOCKS)]
    with pytest.raises(PlanError, match="experts of a block"):
        thinned(experts, Thinning(uniform=False))
    broken = scores(0)
    broken[1] = {**broken[1], "channels.0": (float("nan"),) * WIDTH}
    with pytest.raises(LilliputError, match="NaN"):
        best_units(broken, UNITS, thinned(UNITS, Thinning(uniform=False)))


def test_of_heads_alone_one_leaves_at_least() -> None:
    few = [Units((WIDTH,), 3, 30, 400, 4000)] * 2
    assert [heads_left(3, x, alone=False) for x in (0.0, 0.2, 0.5, 0.99)] == [3, 3, 2, 1]
    assert [heads_left(3, x, alone=True) for x in (0.0, 0.2, 0.5, 0.99)] == [3, 2, 2, 1]
    assert thinner(few, 0.2, 1, ("head",)).heads == 2
    assert thinner(few, 0.0, 1, ("head",)).heads == 3
    assert thinner(few, 0.2, 1, ("channel", "head")).heads == 3
    with pytest.raises(PlanError, match="share one key-value head"):
        thinner([Units((WIDTH,), 1, 30, 400, 4000)], 0.2, 1, ("head",))
