"""OmniQuant's clipping against its equations, written out in float64 on a block of one linear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilliput import api
from lilliput.anatomy.model import Block, Groups, Linear, Site
from lilliput.methods.fit import omniquant
from lilliput.methods.weight import rtn
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.stats.site import SiteStats
from lilliput.streaming.states import Activations
from lilliput.target import Target
from lilliput.verbs.view import BlockFit, FitBlock, FitIO

Tiny = Callable[[str], Path]
BITS, GROUP, ROWS, WIDTH = 3, 8, 6, 24
TARGET = Target(bits=BITS, group_size=GROUP, symmetric=False, scale_dtype="float32")


def case(folder: Path) -> tuple[FitBlock, FitIO, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(ROWS, WIDTH, generator=g), torch.randn(4, 5, WIDTH, generator=g)
    w[:, ::GROUP] *= 3  # an outlier in each group
    stores = []
    for name, value in (("x", x), ("y", x @ w.T)):
        stores.append(Activations(folder / name, tuple(value.shape), torch.float32, create=True))
        stores[-1].write(0, value)
    anatomy = Block((Linear("a", "other", "a", ROWS, WIDTH),), (Site("a", WIDTH, ("a",), 0),), (), Groups())
    block = FitBlock(anatomy, {"a": Layer("a", w)}, lambda weights, h: h @ weights["a"].T)
    return block, FitIO({}, stores[0], stores[1], 2), w.double(), x.double()


def fitted(folder: Path, **options: object) -> tuple[BlockFit, Tensor, Tensor]:
    block, io, w, x = case(folder)
    shared = {"iters": 1, "batch": 4, "start": "minmax", "weigh": "alike", **options}
    return omniquant.fit(block, io, {"a": TARGET}, omniquant.Options.model_validate(shared)), w, x


def through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def clipped(w: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """What, with the equations' range and factors relative to sigma(4)."""
    unit = w.view(ROWS, -1, GROUP)
    low, high = unit.amin(2, keepdim=True).clamp(max=0), unit.amax(2, keepdim=True).clamp(min=0)
    top, one = 2**BITS - 1, torch.sigmoid(torch.tensor(4.0, dtype=torch.float64))
    first = (-low / (high - low) * top).round()  # the start's zero point is whole, which moves its range a little
    step = (high - low) / top
    low, high = -first * step, (top - first) * step
    s = (torch.sigmoid(g) / one * high - torch.sigmoid(b) / one * low) / top
    z = through(-torch.sigmoid(b) / one * low / s)
    return (s * (torch.clamp(through(unit / s) + z, 0, top) - z)).view(ROWS, WIDTH)


def test_one_step_of_adam_is_that_of_the_equations(tmp_path: Path) -> None:
    done, w, x = fitted(tmp_path, lr=1.5)
    g, b = (torch.full((ROWS, WIDTH // GROUP, 1), 4.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    before = (x @ (clipped(w, g, b) - w).T).square().mean()
    before.backward()  # type: ignore[no-untyped-call]
    assert g.grad is not None
    assert b.grad is not None
    with torch.no_grad():  # Adam's first step has the rate's length
        expected = clipped(w, g - 1.5 * g.grad.sign(), b - 1.5 * b.grad.sign())
        after = (x @ (expected - w).T).square().mean()
    assert after < before  # so that the step is kept
    torch.testing.assert_close(done.layers["a"].decode().double(), expected, rtol=1e-4, atol=1e-5)
    assert done.end == pytest.approx(float(after), rel=1e-4)


def test_no_steps_are_rounding_to_nearest_and_steps_clip(tmp_path: Path) -> None:
    still, w, _ = fitted(tmp_path, iters=0)
    nearest = rtn.compress(Layer("a", w.float()), SiteStats(WIDTH, 0), TARGET, rtn.Options(search="minmax"))
    assert torch.equal(still.layers["a"].decode(), nearest.decode())
    moved, _, _ = fitted(tmp_path, iters=60)
    assert moved.end < 0.8 * moved.start
    before, after = (x.layers["a"].parts[0].grid.scale for x in (still, moved))  # type: ignore[attr-defined]
    assert float((after < 0.98 * before).float().mean()) > 0.3


@pytest.mark.slow
def test_it_sees_inputs_that_are_rounded(tiny: Tiny, tmp_path: Path) -> None:
    """The loss at the start is that of rounded weights and inputs."""
    fit = "- {method: omniquant, target: {bits: 4, group_size: 16}, options: {iters: 20}}"
    starts = []
    for n, steps in enumerate(((fit,), ("- {method: act-static-dynamic, target: {bits: 4}}", fit))):
        recipe = "export: lilliput\nsteps:\n" + "".join(f"  {x}\n" for x in steps)
        done = api.compress(
            tiny("qwen2"), tmp_path / str(n), recipe=recipe, samples=4, tokens=32, eval_windows=0, progress=Quiet()
        )
        start, end = done.rows[0]["block_loss"]
        assert end < start
        starts.append(start)
    assert starts[1] > 1.1 * starts[0]
