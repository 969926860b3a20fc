"""8-bit floats with one static scale against numbers that are enumerated, and against compressed-tensors' own."""

from __future__ import annotations

import pytest
import torch

from lilliput.methods import get
from lilliput.runtime.caches.codec import CacheShape, Incoming
from lilliput.runtime.caches.fp8 import KEY, VALUE, Fp8Spec
from lilliput.verbs.cache import CacheIO

SHAPE = CacheShape(2, 16, 8)
# Every number of e4m3: sign, four bits of exponent with bias 7, three of mantissa; 480 would be the last and is NaN.
SMALL = [m / 8 * 2.0**-6 for m in range(8)]
NUMBERS = torch.tensor(
    [s * x for s in (1, -1) for x in [*SMALL, *((1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8))]],
    dtype=torch.float64,
)
NUMBERS = NUMBERS[NUMBERS.abs() <= 448].unique()


def text(tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, tokens, 16, generator=draw) * 3, torch.randn(2, 2, tokens, 8, generator=draw)


def fitted(keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
    method = get("kv-fp8")
    flat = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
    return method.spec.fit(CacheIO(SHAPE, *flat), Fp8Spec(), method.options())  # type: ignore[attr-defined,no-any-return]


def test_what_is_read_is_the_nearest_number_times_the_scale() -> None:
    keys, values = text()
    codec = Fp8Spec().make(SHAPE, {KEY: torch.tensor([0.01]), VALUE: torch.tensor([0.5])})
    codec.append(keys, values, Incoming())
    for x, read, scale in zip((keys, values), codec.materialise(), (0.01, 0.5), strict=True):
        exact = (x.double() / torch.tensor(scale).double()).clamp(-448, 448)
        gaps = (exact[..., None] - NUMBERS).abs()
        ours = read.double() / torch.tensor(scale).double()
        torch.testing.assert_close((exact - ours).abs(), gaps.amin(-1), rtol=0, atol=1e-4)


def test_scales_hold_the_largest_value_in_eight_bits() -> None:
    keys, values = text(50)
    found = fitted(keys, values)
    for name, x in ((KEY, keys), (VALUE, values)):
        largest = float(x.abs().max()) / 448
        assert largest <= float(found[name]) <= largest * (1 + 2**-7)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(found[name].to(dtype).float(), found[name])
    assert float(fitted(keys * 0, values)[KEY]) == 1.0


def test_a_nan_stays_one_and_the_rest_is_cut() -> None:
    keys, values = text(3)
    keys[0, 0, 0, 0], keys[0, 0, 0, 1] = torch.nan, 1e9
    codec = Fp8Spec().make(SHAPE, {KEY: torch.ones(1), VALUE: torch.ones(1)})
    codec.append(keys, values, Incoming())
    read = codec.materialise()[0]
    assert bool(read[0, 0, 0, 0].isnan())
    assert int(read.isnan().sum()) == 1
    assert float(read[0, 0, 0, 1]) == 448.0


@pytest.mark.parametrize("tokens", [1, 7])
def test_bytes_are_one_for_each_element(tokens: int) -> None:
    assert Fp8Spec().size_bits(tokens, SHAPE, 16) == 8 * tokens * SHAPE.heads * (SHAPE.keys + SHAPE.values)


def test_it_is_what_compressed_tensors_computes() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    keys, values = text(30)
    found = fitted(keys, values)
    codec = Fp8Spec().make(SHAPE, found)
    codec.append(keys, values, Incoming())
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    for x, read, name in zip((keys, values), codec.materialise(), (KEY, VALUE), strict=True):
        theirs = fake_quantize(x, found[name], torch.zeros(1), args)
        torch.testing.assert_close(read, theirs, rtol=0, atol=0)
