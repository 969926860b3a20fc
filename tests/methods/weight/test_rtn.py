"""The printed formulas of the uniform quantizer, in float64."""

import torch

from lilliput.formats.integer import IntegerFormat
from lilliput.methods.weight import rtn
from lilliput.parts.layer import Layer
from lilliput.stats.site import SiteStats
from lilliput.target import Target


def test_min_max_rounding_is_the_printed_quantizer() -> None:
    """Codes equal but for ties (none in 2,000 random weights); scales to 1 in 10^6."""
    w = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        for symmetric in (True, False):
            target = Target(bits=bits, group_size=30, symmetric=symmetric, scale_dtype="float32")
            options = rtn.Options(search="minmax", importance=False)
            part = rtn.compress(Layer("x", w), SiteStats(100, 0), target, options).parts[0]
            want = torch.empty(20, 100, dtype=torch.float64)
            for row in range(20):
                for a in range(0, 100, 30):
                    unit = w[row, a : a + 30].double()
                    if symmetric:
                        step, zero = unit.abs().max() / (2 ** (bits - 1) - 1), torch.tensor(0.0)
                        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
                    else:
                        lo, hi = min(0.0, float(unit.min())), max(0.0, float(unit.max()))
                        step = torch.tensor((hi - lo) / (2**bits - 1), dtype=torch.float64)
                        zero = torch.round(-lo / step)
                        low, high = 0, 2**bits - 1
                    want[row, a : a + 30] = (torch.round(unit / step + zero).clamp(low, high) - zero) * step
            torch.testing.assert_close(part.decode().double(), want, rtol=1e-6, atol=1e-8)


def test_the_exponent_of_the_error_is_used() -> None:
    """Against a plain loop over the same shrink factors, before the scale is refined: under |e|^2.4 no unit is over 1 %
    worse for trying a third of them and the best one's neighbours, and all together not 0.1 %."""
    w = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    form = IntegerFormat(3, True, -1, torch.float32)
    top = w.double().abs().amax(1, keepdim=True) / 3

    def error(scale: torch.Tensor) -> torch.Tensor:
        return ((torch.round(w / scale).clamp(-4, 3) * scale) - w).abs().pow(2.4).sum(1)

    best = torch.stack([error((top * (1 - 0.6 * i / 79)).float()) for i in range(80)]).amin(0)
    ours = error(form.fit(w, search="mse", norm=2.4, steps=80).scale)
    assert bool((ours <= best * 1.01).all())
    assert float(ours.sum()) <= float(best.sum()) * 1.001
    square = error(form.fit(w, search="mse", norm=2.0, steps=80).scale)
    assert float(ours.sum()) < float(square.sum())
