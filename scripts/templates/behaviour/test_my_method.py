"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

import torch

from lilliput.methods.behaviour.my_method import Options, fit
from lilliput.runtime.behaviours.gates import BIAS
from lilliput.verbs.behave import Mlp, MlpIO


def test_a_group_counts_as_much_as_it_adds() -> None:
    draw = torch.Generator().manual_seed(0)
    down, x, hidden = (torch.randn(n, m, generator=draw) for n, m in ((5, 7), (11, 4), (11, 7)))
    found = fit(MlpIO(Mlp("mlp", ("up",), "down", 4, 7), down, lambda: iter([(x, hidden)])), Options(channels=3))[BIAS]
    # replace: your equations, as slow and obvious as they come
    for group, channels in enumerate(((0, 1, 2), (3, 4, 5), (6,))):
        total = 0.0
        for token in range(11):
            added = sum(down[:, j].double() * float(hidden[token, j]) for j in channels)
            total += float(torch.as_tensor(added).norm())
        assert abs(float(found[group]) - total / 11) < 1e-5 * total
