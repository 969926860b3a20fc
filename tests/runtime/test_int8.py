"""Products of integers are those of rounded inputs and decoded weights."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lilliput.formats.integer import IntegerFormat
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import SCALE, ZERO, UniformInput
from lilliput.parts.linear import LinearSpec
from lilliput.parts.quantized import QuantizedPart, QuantizedSpec
from lilliput.parts.scheme import ACTIVATION, Scheme
from lilliput.runtime import int8
from lilliput.runtime.linear import IntegerLinear, compress_

ROWS, WIDTH = 24, 40


@pytest.fixture(autouse=True, params=["native", "in floats"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in floats":
        monkeypatch.setattr(int8, "native", lambda: False)
    elif not int8.native():
        pytest.skip("torch has no whole 8-bit products on this machine")


def made(inputs: UniformInput, transposed: bool = False) -> tuple[nn.Module, Tensor, InputGrid]:
    """A compressed linear, its decoded weight [out, in], and the grid of its inputs."""
    draw = torch.Generator().manual_seed(0)
    form = IntegerFormat(bits=8, group_size=-1, symmetric=True, scale_dtype=torch.float32)
    weight = torch.randn(ROWS, WIDTH, generator=draw)
    part = QuantizedPart(form, form.encode(weight, grid := form.fit(weight)), grid)
    tensors: dict[str, Tensor] = {}
    if not inputs.dynamic:
        scale, zero = inputs.parameters(torch.tensor([-3.0]), torch.tensor([5.0]))
        tensors = {SCALE: scale} | ({} if zero is None else {ZERO: zero.to(torch.int32)})
    own = InputGrid(inputs, tensors)
    scheme = Scheme((QuantizedSpec(form),), activation=inputs)
    spec = LinearSpec("x", "x", ROWS, WIDTH, scheme, transposed)
    module: nn.Module = Conv1D(ROWS, WIDTH) if transposed else nn.Linear(WIDTH, ROWS)
    compress_(module, spec)
    assert isinstance(module, IntegerLinear)
    stored = {f"x.weight{k}": v for k, v in part.pack().items()}
    module.fill(stored | {f"x.weight{ACTIVATION}{k}": v for k, v in own.pack().items()}, torch.device("cpu"))
    return module, part.decode(), own


UNITS = [("token", True), ("tensor", True), ("tensor", False)]
KINDS = [
    UniformInput(8, unit, symmetric=symmetric, dynamic=dynamic)  # type: ignore[arg-type]
    for (unit, dynamic), symmetric in itertools.product(UNITS, [True, False])
]


@pytest.mark.parametrize("inputs", KINDS, ids=UniformInput.describe)
@pytest.mark.parametrize("transposed", [False, True])
def test_integers_give_what_rounded_floats_give(inputs: UniformInput, transposed: bool) -> None:
    module, weight, grid = made(inputs, transposed)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.3
    with torch.no_grad():
        expected = grid.round(x).double() @ weight.double().T + module.bias.double()
        actual = module(x)
        assert module._integers is not None
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    with torch.enable_grad():
        learned = module(x.clone().requires_grad_())
    torch.testing.assert_close(learned, actual, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_half_precision_copies_and_pickles() -> None:
    module, weight, grid = made(UniformInput(8))
    x = torch.randn(3, WIDTH).bfloat16()
    with torch.no_grad():
        module.bias = nn.Parameter(module.bias.detach().bfloat16(), requires_grad=False)  # type: ignore[assignment]
        first = module(x)
        assert first.dtype is torch.bfloat16
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module.__getstate__()))):
            if isinstance(other, nn.Module):
                assert torch.equal(other(x), first)
            else:
                assert "_integers" not in other
        expected = grid.round(x.float()) @ weight.T + module.bias.float()
    torch.testing.assert_close(first.float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_no_tokens_give_no_outputs() -> None:
    module, _, _ = made(UniformInput(8))
    with torch.no_grad():
        assert module(torch.empty(0, WIDTH)).shape == (0, ROWS)


def test_what_has_no_integer_product() -> None:
    eight, four = (
        QuantizedSpec(IntegerFormat(bits=n, group_size=-1, symmetric=True, scale_dtype=torch.float32)) for n in (8, 4)
    )
    assert int8.forms(Scheme((eight,), activation=UniformInput(8))) is not None
    assert int8.forms(Scheme((four,), activation=UniformInput(8))) is None
    assert int8.forms(Scheme((eight,), activation=UniformInput(8, "group", 8))) is None
    assert int8.forms(Scheme((eight,), activation=UniformInput(4))) is None
    assert int8.forms(Scheme((eight,))) is None


def test_floats_on_request() -> None:
    module, weight, grid = made(UniformInput(8))
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), int8.in_floats():
        actual = module(x)
        assert module._integers is None
        assert torch.equal(actual, nn.functional.linear(grid.round(x), weight, module.bias))
    with torch.no_grad():
        module(x)
    assert module._integers is not None


def test_nan_stays_nan_with_a_static_scale() -> None:
    module, _, _ = made(UniformInput(8, "tensor", dynamic=False))
    x = torch.randn(3, WIDTH)
    x[1, 4] = torch.nan
    with torch.no_grad():
        out = module(x)
    assert bool(out[1].isnan().all())
    assert bool(out[[0, 2]].isfinite().all())


@pytest.mark.parametrize(("rows", "width"), [(3, 5), (7, 1024), (5, 2500)])
def test_sums_are_whole(monkeypatch: pytest.MonkeyPatch, rows: int, width: int) -> None:
    monkeypatch.setattr(int8, "_PIECE", 4096)  # some rows and inputs at a time
    draw = torch.Generator().manual_seed(0)
    weights = torch.randint(-127, 128, (rows, width), generator=draw, dtype=torch.int8)
    codes = torch.randint(-128, 128, (4, width), generator=draw).float()
    weights[0], codes[0] = -127, -128
    found = int8.Weights.of(weights, torch.ones(rows)).kernel.sums(codes + 0.25)
    expected = codes.double() @ weights.double().T
    torch.testing.assert_close(found.double(), expected, rtol=2**-24, atol=0)
    if width <= 1024:
        assert torch.equal(found.double(), expected)


def test_products_that_saturate_are_not_used() -> None:
    code = "from lilliput.runtime import int8; print(int8.native())"
    environment = {**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() in ("False", "True" if not int8.native() else "False"), done.stderr
