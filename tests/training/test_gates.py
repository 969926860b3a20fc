"""Hard-concrete gates against their closed forms, multipliers, and gates on modules of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.model.edit import Edit
from lilliput.model.edited import EditedModel
from lilliput.model.rotated import ready
from lilliput.model.stored import Model, open_model
from lilliput.run.gating import attached
from lilliput.training.gates import BETA, GAMMA, ZETA, Gates, drawn, open_chance, settled
from lilliput.verbs.gated import Shape, Training

Tiny = Callable[[str], Path]
SHAPE = Shape({"block": 1, "heads": 1, "channels.0": 96, "hidden": 48})
COUNTS = {"block": 1, "heads": 2, "channels.0": 128, "hidden": 64}


@pytest.mark.parametrize("log_alpha", [-2.0, -0.5, 0.0, 1.5])
def test_gates_are_closed_and_open_as_often_as_their_distribution_says(log_alpha: float) -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = drawn(torch.full_like(u, log_alpha), u)

    def below(x: float) -> float:
        """P(s (zeta - gamma) + gamma <= x)."""
        s = (x - GAMMA) / (ZETA - GAMMA)
        return 1 / (1 + math.exp(log_alpha - BETA * (math.log(s) - math.log(1 - s))))

    assert float((z == 0).double().mean()) == pytest.approx(below(0.0), abs=4e-3)
    assert float((z == 1).double().mean()) == pytest.approx(1 - below(1.0), abs=4e-3)
    chance = float(open_chance(torch.tensor(log_alpha, dtype=torch.float64)))
    assert chance == pytest.approx(1 - below(0.0), abs=1e-9)


def test_gradients_reach_log_alpha_where_gates_are_neither_closed_nor_open() -> None:
    log_alpha = torch.tensor([0.0, 9.0, -9.0], requires_grad=True)
    drawn(log_alpha, torch.full((3,), 0.5)).sum().backward()  # type: ignore[no-untyped-call]
    assert log_alpha.grad is not None
    assert float(log_alpha.grad[0]) > 0
    assert log_alpha.grad[1:].tolist() == [0.0, 0.0]
    assert settled(torch.tensor([20.0, -20.0])).tolist() == [1.0, 0.0]


def _gates(shape: Shape | None = SHAPE, **more: Any) -> Gates:
    return Gates(Training(COUNTS, 2, shape, warm=0.5, **more), {}, 0)


def test_the_penalty_is_that_of_its_equation_and_zero_at_the_target() -> None:
    gates = _gates()
    torch.manual_seed(0)
    with torch.no_grad():
        for x in gates.parameters():
            x.copy_(torch.randn_like(x))
    gates.step(0.25)  # half of the way down
    total = 0.0
    for kind, stay in SHAPE.stay.items():
        key = kind.replace(".", "/")
        chance = torch.sigmoid(gates.raw[key].detach().double() - BETA * math.log(-GAMMA / ZETA))
        rows = chance.reshape(1, -1) if kind in ("block", "hidden") else chance
        for n, row in enumerate(rows):
            target = len(row) - 0.5 * (len(row) - stay)
            d = (float(row.sum()) - target) / len(row)
            linear, square = gates.multipliers[key][:, n].tolist()
            total += linear * d + square * d * d
    penalty = gates.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(total, rel=1e-5)
    even = _gates(Shape({"heads": 1}))
    with torch.no_grad():
        even.raw["heads"].fill_(BETA * math.log(-GAMMA / ZETA))  # each open with chance one half
        even.multipliers["heads"].fill_(3.0)
    even.step(1.0)
    nothing = even.penalty()
    assert nothing is not None
    assert float(nothing.detach()) == pytest.approx(0.0, abs=1e-6)


def test_gates_go_down_and_multipliers_up() -> None:
    gates = _gates(Shape({"heads": 1}))
    gates.step(1.0)
    with torch.no_grad():
        gates.multipliers["heads"].fill_(1.0)
    penalty = gates.penalty()
    assert penalty is not None
    penalty.backward()  # type: ignore[no-untyped-call]
    gap = gates.gaps()["heads"].detach()
    slope = gates.multipliers["heads"].grad
    assert slope is not None
    torch.testing.assert_close(slope, -torch.stack([gap, gap.square()]))
    assert gates.raw["heads"].grad is not None
    assert bool((gates.raw["heads"].grad > 0).all())


def test_the_expected_share_of_weights_counts_branches_blocks_and_the_stream() -> None:
    shape = Shape(share=0.5, head_cost=10, channel_cost=3, fixed=7)
    gates = Gates(Training({**COUNTS, "attention": 1, "mlp": 1}, 2, shape), {}, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for x in gates.raw.values():
            x.copy_(torch.randn_like(x))
    p = {kind: gates.chance(kind).detach().double() for kind in gates.training_of.counts}
    left = 0.0
    for n in range(2):
        heads, channels = float(p["heads"][n].sum()), float(p["channels.0"][n].sum())
        own = 7 + 10 * heads * float(p["attention"][n]) + 3 * channels * float(p["mlp"][n])
        left += own * float(p["block"][n])
    expected = left / (2 * (7 + 20 + 3 * 128)) * float(p["hidden"].mean())
    assert float(gates.expected().detach()) == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def base(tiny: Tiny) -> Model:
    return ready(open_model(tiny("qwen2")))


def _logits(model: Model, ids: Tensor) -> Tensor:
    names = tuple(model.skeleton.shapes)
    model.load(names)
    with torch.no_grad():
        out = model.skeleton.logits(model.skeleton.read(ids))
    model.unload(names)
    return out


def test_open_gates_leave_the_model_as_it_is(base: Model) -> None:
    ids = torch.arange(24).view(2, 12)
    expected = _logits(base, ids)
    gates = _gates()
    with attached(base, gates, gates.training_of):
        torch.testing.assert_close(_logits(base, ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_logits(base, ids), expected, rtol=0.0, atol=0.0)


def test_a_model_with_closed_gates_is_the_sliced_one(base: Model) -> None:
    """Of blocks, heads, hidden channels and channels of the residual stream."""
    ids = torch.arange(24).view(2, 12)
    gates = _gates()
    torch.manual_seed(2)
    kept = {
        "hidden": torch.randperm(64)[:48].sort().values,
        "heads": torch.tensor([1]),
        "channels.0": torch.randperm(128)[:96].sort().values,
    }
    with torch.no_grad():
        for kind, index in kept.items():
            raw = gates.raw[kind.replace(".", "/")]
            raw.fill_(-20.0)
            raw[..., index] = 20.0
        gates.raw["block"][0] = -20.0
        gates.raw["block"][1] = 20.0
    with attached(base, gates, gates.training_of):
        masked = _logits(base, ids)
    edit = Edit(
        (1,),
        {(1, 0): tuple(kept["channels.0"].tolist())},
        {1: (1,)},
        48,
        residual=tuple(kept["hidden"].tolist()),
    )
    sliced = EditedModel(base, Edit.from_plain(edit.plain()))
    assert sliced.skeleton.config.num_hidden_layers == 1
    torch.testing.assert_close(_logits(sliced, ids), masked, rtol=1e-4, atol=1e-4)
