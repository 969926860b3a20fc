"""Channels with outliers stay, the rest is integers by token: beside loops over single numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lilliput.errors import PlanError
from lilliput.methods.inputs.llm_int8 import Options, inputs
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.mixed import MixedInput
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.layer import Layer
from lilliput.stats import fold
from lilliput.target import Target


def drawn() -> Tensor:
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))
    x[1, 2, 7] = 9.0
    x[0, 4, 11] = -6.0
    x[0, 1] = 0.0
    return x


def made(alpha: float) -> InputGrid:
    return inputs(Layer("x", torch.zeros(4, 24)), fold.init(24, ()), Target(bits=8), Options(alpha=alpha))


def test_outliers_are_found_in_the_pass_and_the_rest_is_rounded() -> None:
    x = drawn()
    tokens = x.view(-1, 24).double().tolist()
    outliers = [j for j in range(24) if any(abs(row[j]) >= 6.0 for row in tokens)]
    assert outliers == [7, 11]
    expected = []
    for row in tokens:
        rest = [v for j, v in enumerate(row) if j not in outliers]
        scale = max(abs(v) for v in rest) / 127.5 or 1.0
        rounded = [min(max(round(v / scale), -128), 127) * scale for v in row]
        expected.append([v if j in outliers else r for j, (v, r) in enumerate(zip(row, rounded, strict=True))])
    close = (made(6.0).round(x).view(-1, 24) - torch.tensor(expected)).abs() < 1e-5
    assert float(close.float().mean()) > 0.97  # float32 may fall on the other side of a half


def test_the_ends_are_nothing_rounded_and_all() -> None:
    x = drawn()
    assert torch.equal(made(0.0).round(x), x)
    assert torch.equal(made(1e30).round(x), InputGrid(UniformInput(8)).round(x))


def test_a_huge_channel_changes_no_other() -> None:
    x = drawn()
    before = made(6.0).round(x)
    wilder = x.clone()
    wilder[..., 7] *= 1000.0
    after = made(6.0).round(wilder)
    others = [j for j in range(24) if j != 7]
    assert torch.equal(before[..., others], after[..., others])
    assert torch.equal(after[..., 7], wilder[..., 7])


def test_one_token_without_further_axes() -> None:
    x = drawn()[1, 2]
    assert torch.equal(made(6.0).round(x), made(6.0).round(x[None])[0])


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_integers_do_not_have_are_refused(bits: int) -> None:
    with pytest.raises(PlanError, match="2 to 8"):
        MixedInput(bits, 6.0)
