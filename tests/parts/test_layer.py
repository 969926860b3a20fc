import pytest
import torch

from lilliput.formats.integer import IntegerFormat
from lilliput.parts.dense import DensePart
from lilliput.parts.layer import Layer, split, stack
from lilliput.parts.lowrank import plain_factors
from lilliput.parts.quantized import QuantizedPart


def _weight(rows: int = 6, width: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _quantized(w: torch.Tensor) -> QuantizedPart:
    form = IntegerFormat(3, False, 8)
    grid = form.fit(w)
    return QuantizedPart(form, form.encode(w, grid), grid)


def test_parts_add_up_and_a_step_fits_the_rest() -> None:
    w = _weight()
    first = Layer("x", w).with_part(_quantized(w))
    u, s, v = torch.linalg.svd(first.rest())
    second = first.with_part(plain_factors(u[:, :2] * s[:2], v[:2]))
    assert float(second.rest().norm()) < float(first.rest().norm())
    torch.testing.assert_close(second.decode() + second.rest(), w, rtol=0, atol=1e-6)
    assert second.weight is w


def test_sizes() -> None:
    assert DensePart(_weight(), torch.bfloat16).bits() == 120 * 16
    assert _quantized(_weight()).bits() == 120 * 3 + 6 * 3 * (16 + 3)
    assert plain_factors(torch.zeros(6, 2), torch.zeros(2, 20)).bits() == 52 * 16


def test_dense_parts_round_to_their_dtype() -> None:
    w = _weight()
    assert torch.equal(DensePart(w, torch.bfloat16).decode(), w.bfloat16().float())


def test_supports_combine_and_decode_to_zero() -> None:
    w, g = _weight(), torch.Generator().manual_seed(1)
    a, b = (torch.rand(6, 20, generator=g) < 0.6 for _ in range(2))
    layer = Layer("x", w).with_support(a).with_support(b)
    assert torch.equal(layer.decode(), w * (a & b))
    assert torch.equal(Layer("x", w).decode(), w)


def test_stack_and_split_are_inverse() -> None:
    mask = _weight(6) > 0
    layers = [Layer("a", _weight(6)), Layer("b", _weight(3, seed=1)), Layer("c", _weight(6, seed=2), support=mask)]
    whole = stack(layers)
    assert whole.name == "a+b+c"
    for one, back in zip(layers, split(whole, [("a", 6), ("b", 3), ("c", 6)]), strict=True):
        assert one.name == back.name
        assert torch.equal(one.decode(), back.decode())
    part = _quantized(whole.weight)
    pieces = split(whole.with_part(part), [("a", 6), ("b", 3), ("c", 6)])
    assert torch.equal(torch.cat([p.decode() for p in pieces]), part.decode())
    assert stack(layers[:1]) is layers[0]
    with pytest.raises(ValueError, match="without parts"):
        stack([layers[0].with_part(_quantized(layers[0].weight)), layers[1]])


def test_rows_of_every_kind_of_part() -> None:
    w = _weight()
    for part in (DensePart(w), _quantized(w), plain_factors(_weight(6, 2), _weight(2, 20))):
        assert torch.equal(part.rows(2, 5).decode(), part.decode()[2:5])


def test_updated_values_are_what_a_pruned_layer_holds_until_it_has_parts() -> None:
    w, new = _weight(6), _weight(6, seed=3)
    mask = _weight(6, seed=4) > 0
    layer = Layer("a", w).with_support(mask, new)
    assert torch.equal(layer.decode(), new * mask)
    assert torch.equal(layer.rest(), w), "a step that quantizes solves for the weight as it was"
    whole = stack([layer, Layer("b", w)])
    assert torch.equal(whole.decode(), torch.cat([new * mask, w]))
    assert torch.equal(split(whole, [("a", 6), ("b", 6)])[0].decode(), layer.decode())
    assert torch.equal(layer.with_part(_quantized(w)).decode(), _quantized(w).decode())
    assert torch.equal(layer.refined(~mask).decode(), w * ~mask)
