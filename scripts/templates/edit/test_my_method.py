"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

import pytest
import torch

from lilliput.anatomy.model import Block, Channels, Groups, Linear
from lilliput.methods.edit.my_method import Options, run, score, sizes
from lilliput.verbs.edits import EditIO, EditView, Units

WIDTH = 24


def test_channels_of_the_smallest_sums_leave() -> None:
    weight = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 0.0
    down = Linear("down", "down", "down", 6, WIDTH)
    up = Linear("up", "up", "up", WIDTH, 6)
    inner = Channels((("up", torch.arange(WIDTH)),), ("down",), WIDTH)
    block = Block((up, down), (), (), Groups((), (inner,)))
    found = score(EditView(block, lambda _: weight), EditIO({}, {}, {}), Options())
    for j, value in enumerate(found["channels.0"]):
        # replace: your equations, as slow and obvious as they come
        assert value == pytest.approx(sum(abs(float(w)) for w in weight[:, j]))
    units = [Units((WIDTH,), 0, 12, 0, 12 * WIDTH)]
    planned = sizes(units, Options(ratio=0.3))
    assert planned.channels == 16
    kept = run([found], units, planned, Options()).channels[0, 0]
    assert len(kept) == 16
    assert 3 not in kept
