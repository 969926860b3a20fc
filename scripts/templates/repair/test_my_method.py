"""my-method against a slow version written from its equations, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lilliput.anatomy.model import Block, Groups
from lilliput.methods.repair.my_method import Options, repair
from lilliput.streaming.states import Activations
from lilliput.verbs.repair import Consumer, RepairIO
from lilliput.verbs.view import FitBlock, FitIO


def test_the_factor_is_the_best_one(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 8, generator=draw), torch.randn(40, 8, generator=draw)
    kept = torch.tensor([0, 2, 3, 7])
    states = Activations(tmp_path / "states.bin", (1, 1, 1), torch.float32, create=True)
    halves = (x[:20].T @ x[:20], x[20:].T @ x[20:])
    io = RepairIO(FitIO({}, states, states, 1), lambda: {"down": Consumer(weight, halves, kept)}, lambda *_: iter(()))
    block = FitBlock(Block((), (), (), Groups()), {}, lambda weights, hidden: hidden)
    found = repair(block, io, Options())["down"]
    # replace: your equations, as slow and obvious as they come
    wanted, gives = (x @ weight.T).double(), (x[:, kept] @ weight[:, kept].T).double()
    factor = float((wanted * gives).sum() / gives.square().sum())
    torch.testing.assert_close(found, weight[:, kept] * factor, rtol=1e-4, atol=1e-5)
    assert factor != pytest.approx(1.0, abs=1e-3)
    states.delete()
