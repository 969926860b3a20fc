"""Knowledge of predictions and outputs against sums over samples and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lilliput.methods.edit import kprune
from lilliput.verbs.edits import EditIO


@pytest.mark.parametrize("output", [0.0, 1.0, 2.5])
def test_scores_are_fisher_information_and_lost_output_of_one_size(scored: Any, output: float) -> None:
    draw = torch.Generator().manual_seed(4)
    gates = {n: torch.randn(6, c, generator=draw).double() for n, c in (("heads", 2), ("channels.0", 40))}
    io = EditIO(scored.stats("gram"), {}, {}, gates=gates)
    got = kprune.score(scored.view, io, kprune.Options(output=output))
    for key, name, width in (("heads", "self_attn.o_proj", 12), ("channels.0", "mlp.down_proj", 1)):
        count = gates[key].shape[1]
        fisher = [sum(float(v) ** 2 for v in gates[key][:, u]) / 6 for u in range(count)]
        lost = []
        for u in range(count):
            own = slice(width * u, width * (u + 1))
            lost.append(sum(float((scored.weights[name][:, own] @ x[own]).square().sum()) for x in scored.x[name]) / 50)
        for u, value in enumerate(got[key]):
            assert value == pytest.approx(fisher[u] + output * lost[u] * sum(fisher) / sum(lost), rel=1e-4)


def test_what_nothing_depends_on_scores_zero(scored: Any) -> None:
    gates = {"channels.0": torch.ones(3, 40, dtype=torch.float64)}
    gates["channels.0"][:, 5] = 0.0
    scored.weights["mlp.down_proj"][:, 5] = 0.0
    got = kprune.score(scored.view, EditIO(scored.stats("gram"), {}, {}, gates=gates), kprune.Options())["channels.0"]
    assert got[5] == 0.0
    assert min(got[:5] + got[6:]) > 0.0
