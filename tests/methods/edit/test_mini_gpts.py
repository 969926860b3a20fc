"""Mean activations, added up by hand."""

from __future__ import annotations

from typing import Any

import pytest

from lilliput.methods.edit import mini_gpts
from lilliput.verbs.edits import EditIO, Sizes, Units


def test_scores_are_mean_sizes_of_what_is_handed_on(scored: Any) -> None:
    got = mini_gpts.score(scored.view, EditIO(scored.stats("absmean"), {}, {}), mini_gpts.Options())
    x = scored.x["mlp.down_proj"]
    for j, value in enumerate(got["channels.0"]):
        assert value == pytest.approx(sum(abs(float(v)) for v in x[:, j]) / 50, rel=1e-5)
    x = scored.x["self_attn.o_proj"]
    for n, value in enumerate(got["heads"]):
        assert value == pytest.approx(float(x[:, 12 * n : 12 * n + 12].abs().mean()), rel=1e-5)


def test_silent_channels_leave_first(scored: Any) -> None:
    scored.x["mlp.down_proj"][:, [4, 31]] = 0.0
    got = mini_gpts.score(scored.view, EditIO(scored.stats("absmean"), {}, {}), mini_gpts.Options())
    kept = mini_gpts.METHOD.run([got], [Units((40,), 2, 72, 1, 1)], Sizes(1, 38), mini_gpts.Options()).channels[0, 0]
    assert set(range(40)) - set(kept) == {4, 31}
