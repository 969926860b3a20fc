"""A linear that is one product of factors runs as two products; every other one is decoded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lilliput.algebra import products
from lilliput.formats.binary import BinaryFormat
from lilliput.formats.integer import IntegerFormat
from lilliput.parts import bitmask
from lilliput.parts.dense import DensePart
from lilliput.parts.layer import Layer
from lilliput.parts.linear import LinearSpec, read_linear
from lilliput.parts.lowrank import approximate, factor_spec
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import of
from lilliput.parts.transform import Rotation
from lilliput.runtime import linear as runtime
from lilliput.runtime import lut
from lilliput.runtime.linear import FactoredLinear, MaskedLinear, TabledLinear, compress_

ROWS, WIDTH = 24, 32


def weight() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5


def filled(module: nn.Module, layer: Layer, transposed: bool = False) -> Any:
    scheme = of(layer)
    spec = LinearSpec("x", "x", ROWS, WIDTH, scheme, transposed)
    compress_(module, spec)
    tensors = {spec.payload + suffix: t for suffix, t in scheme.pack(layer).items()}
    module.fill(tensors, torch.device("cpu"))  # type: ignore[operator]
    assert torch.equal(module.weight, read_linear(tensors, spec).to(module.weight.dtype))  # type: ignore[union-attr, arg-type]
    return module


class Scaled(nn.Linear):
    """A model's own linear, which computes more than a product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


@pytest.mark.parametrize(("kind", "shape"), [(nn.Linear, (ROWS, WIDTH)), (Conv1D, (WIDTH, ROWS))])
def test_before_it_is_filled_the_weight_has_its_shape_and_no_values(kind: type, shape: tuple[int, int]) -> None:
    """Initializations of models read shapes while transformers loads."""
    module: Any = nn.Linear(WIDTH, ROWS) if kind is nn.Linear else Conv1D(ROWS, WIDTH)
    part = IntegerFormat(4, True, 16)
    layer = Layer("x", weight())
    grid = part.fit(layer.weight)
    scheme = of(layer.with_part(QuantizedPart(part, part.encode(layer.weight, grid), grid)))
    compress_(module, LinearSpec("x", "x", ROWS, WIDTH, scheme, kind is Conv1D))
    assert tuple(module.weight.shape) == shape
    assert module.weight.is_meta
    assert module.weight._is_hf_initialized


@pytest.mark.parametrize("name", ["float16", "float32", "int8", "int4"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_products_are_the_merged_one(name: Any, kind: Any, bias: bool, dtype: torch.dtype) -> None:
    module = Conv1D(ROWS, WIDTH) if kind is Conv1D else nn.Linear(WIDTH, ROWS, bias=bias)
    if module.bias is not None:
        module.bias.data = torch.linspace(-1, 1, ROWS)
    kept = None if module.bias is None else module.bias.detach().clone()
    layer = Layer("x", weight()).with_part(approximate(weight(), 6, factor_spec(name)))
    module = filled(module.to(dtype), layer, transposed=kind is Conv1D)
    assert isinstance(module, FactoredLinear)
    assert isinstance(module, kind)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    merged = nn.functional.linear(x.double(), layer.decode().double(), None if kept is None else kept.double())
    with torch.no_grad():
        got = module(x)
    assert got.dtype == dtype
    assert got.shape == (2, 5, ROWS)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert float((got.double() - merged).abs().max()) < rounding * (1 + float(merged.abs().max()))
    if kept is not None:
        assert torch.equal(module.bias.detach().float(), kept.to(dtype).float())


def test_nothing_is_decoded_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    module = filled(
        nn.Linear(WIDTH, ROWS), Layer("x", weight()).with_part(approximate(weight(), 6, factor_spec("int8")))
    )

    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the product was formed")

    monkeypatch.setattr(runtime, "decode", never)
    assert bool(torch.isfinite(module(torch.ones(1, WIDTH))).all())
    held = sum(b.numel() * b.itemsize for b in module.buffers())
    assert held == 6 * (ROWS + WIDTH) + 2 * (ROWS + 6)


@pytest.mark.parametrize("what", ["two parts", "dense", "rotated", "own class"])
def test_everything_else_is_decoded(what: str) -> None:
    layer, w = Layer("x", weight()), weight()
    product = approximate(w, 6, factor_spec("float32"))
    if what == "two parts":
        form = IntegerFormat(4, True, -1)
        grid = form.fit(w)
        layer = layer.with_part(QuantizedPart(form, form.encode(w, grid), grid), product)
    elif what == "dense":
        layer = layer.with_part(DensePart(w))
    elif what == "rotated":
        turned = layer.between(inputs=(Rotation("hadamard", 3),))
        layer = turned.with_part(approximate(turned.rest(), 6, factor_spec("float32")))
    else:
        layer = layer.with_part(product)
    module = filled((Scaled if what == "own class" else nn.Linear)(WIDTH, ROWS, bias=False), layer)
    assert not isinstance(module, FactoredLinear)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    factor = 2.0 if what == "own class" else 1.0
    torch.testing.assert_close(module(x), factor * (x @ layer.decode().T), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_binary_codes_run_by_tables_while_tokens_are_few(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = BinaryFormat(3, 16)
    grid = form.fit(weight(), rounds=1)
    layer = Layer("x", weight()).with_part(QuantizedPart(form, form.encode(weight(), grid), grid))
    module = Conv1D(ROWS, WIDTH) if kind is Conv1D else nn.Linear(WIDTH, ROWS)
    module.bias.data = torch.linspace(-1, 1, ROWS)
    bias = module.bias.detach().to(dtype).double()
    module = filled(module.to(dtype), layer, transposed=kind is Conv1D)
    assert isinstance(module, TabledLinear)
    packed = of(layer).pack(layer)
    assert torch.equal(module.stored("x.weight"), packed[""])
    held = sum(x.nbytes for name, x in module.named_buffers() if name.startswith("packed_"))
    assert held == sum(x.nbytes for x in packed.values()), "no more memory than the file has"
    asked: list[int] = []
    real = lut.matmul

    def counted(x: Tensor, *rest: Any) -> Tensor:
        asked.append(len(x))
        return real(x, *rest)

    monkeypatch.setattr(lut, "matmul", counted)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for tokens in (1, lut.most(form), lut.most(form) + 1, 40):
        x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        wanted = x.double() @ layer.decode().double().T + bias
        with torch.no_grad():
            got = module(x)
        assert (got.dtype, got.shape) == (dtype, (1, tokens, ROWS))
        assert float((got.double() - wanted).abs().max()) < rounding * (1 + float(wanted.abs().max()))
    assert asked == [1, lut.most(form)]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", [False, True])
def test_kept_weights_run_by_themselves_while_tokens_are_few(
    kind: Any, dtype: torch.dtype, product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(2)) < 0.4
    layer = Layer("x", weight()).with_part(bitmask.gather(weight(), mask, dtype))
    if product:
        layer = layer.with_part(approximate(layer.rest(), 3, factor_spec("int8")))
    module = Conv1D(ROWS, WIDTH) if kind is Conv1D else nn.Linear(WIDTH, ROWS)
    module.bias.data = torch.linspace(-1, 1, ROWS)
    bias = module.bias.detach().to(dtype).double()
    module = filled(module.to(dtype), layer, transposed=kind is Conv1D)
    assert isinstance(module, MaskedLinear)
    held = sum(x.nbytes for name, x in module.named_buffers() if name.startswith("packed_"))
    assert held == sum(x.nbytes for x in of(layer).pack(layer).values()), "no more memory than the file has"
    asked: list[int] = []
    real = products.Product.__call__

    def counted(self: products.Product, x: Tensor) -> Tensor:
        asked.append(len(x))
        return real(self, x)

    monkeypatch.setattr(products.Product, "__call__", counted)
    most = products.most()
    rounding = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for tokens in (1, most, most + 1, 40):
        x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        wanted = x.double() @ layer.decode().double().T + bias
        with torch.no_grad():
            got = module(x)
        assert (got.dtype, got.shape) == (dtype, (1, tokens, ROWS))
        assert float((got.double() - wanted).abs().max()) < rounding * (1 + float(wanted.abs().max()))
    assert asked == [1, most]
    learning = torch.ones(1, WIDTH, dtype=dtype, requires_grad=True)
    module(learning).sum().backward()
    assert learning.grad is not None
    module(torch.ones(1, WIDTH, dtype=dtype))  # its bias may learn
    assert asked == [1, most]
    again = copy.deepcopy(module)
    with torch.no_grad():
        assert torch.equal(again(learning), module(learning))
    assert asked == [1, most, 1, 1]
    monkeypatch.setattr(products, "available", lambda: False)
    with torch.no_grad():
        torch.testing.assert_close(module(learning), again(learning))
    assert asked == [1, most, 1, 1]
