"""OmniQuant's clipping and its scales and shifts against their equations, written out in float64 on small blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput import api
from lilliput.anatomy.model import Block, Groups, Linear, Link, Site
from lilliput.errors import PlanError
from lilliput.folds.kinds import ScaleFold, ShiftFold
from lilliput.methods.fit import omniquant
from lilliput.methods.weight import rtn
from lilliput.model.stored import open_model
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


def clipped(w: Tensor, g: Tensor, b: Tensor, s: Tensor | None = None) -> Tensor:
    """What, with the equations' range and factors relative to sigma(4); s: scales of the channels of w."""
    unit = w.view(ROWS, -1, GROUP)
    low, high = unit.amin(2, keepdim=True).clamp(max=0), unit.amax(2, keepdim=True).clamp(min=0)
    top, one = 2**BITS - 1, torch.sigmoid(torch.tensor(4.0, dtype=torch.float64))
    first = (-low / (high - low) * top).round()  # the start's zero point is whole, which moves its range a little
    step = (high - low) / top
    low, high = -first * step, (top - first) * step
    if s is not None:
        unit = (w * s).view(ROWS, -1, GROUP)
        low = low * unit.amin(2, keepdim=True) / w.view(ROWS, -1, GROUP).amin(2, keepdim=True)
        high = high * unit.amax(2, keepdim=True) / w.view(ROWS, -1, GROUP).amax(2, keepdim=True)
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


def normed(folder: Path) -> tuple[FitBlock, FitIO, dict[str, Tensor], Tensor, Tensor]:
    """A norm that gains and shifts, and a linear with a bias behind it."""
    block, io, w, h = case(folder)
    g = torch.Generator().manual_seed(1)
    vectors = {"n.weight": torch.rand(WIDTH, generator=g) + 0.5, "n.bias": torch.randn(WIDTH, generator=g)}
    vectors["n.weight"][3] = 20.0  # a channel that stands out
    vectors["a.bias"] = torch.randn(ROWS, generator=g)
    link = Link("norm", "n", ("a",), "a", torch.arange(WIDTH), shifts=True)

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        v = vectors | weights
        return (hidden * v["n.weight"] + v["n.bias"]) @ v["a"].T + v["a.bias"]

    x = h * vectors["n.weight"] + vectors["n.bias"]
    y = Activations(folder / "wanted", tuple(io.targets.shape), torch.float32, create=True)
    y.write(0, run({"a": w.float()}, h.float()))
    stats = {"a": SiteStats(WIDTH, 20, square=x.flatten(0, 1).square().sum(0).float())}
    anatomy = replace(block.anatomy, links=(link,))
    return (
        replace(block, anatomy=anatomy, run=run, vectors=vectors),
        replace(io, stats=stats, targets=y),
        {name: value.double() for name, value in vectors.items()},
        w,
        h,
    )


def test_one_step_of_scales_and_shifts_is_that_of_the_equations(tmp_path: Path) -> None:
    block, io, v, w, h = normed(tmp_path)
    o = omniquant.Options(iters=1, batch=4, start="minmax", weigh="alike", let="all", lr=0.5, let_lr=0.02)
    done = omniquant.fit(block, io, {"a": TARGET}, o)
    unit = (h * v["n.weight"] + v["n.bias"]).square().mean((0, 1)).sqrt()
    g, b = (torch.full((ROWS, WIDTH // GROUP, 1), 4.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t, d = (torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss(g: Tensor, b: Tensor, t: Tensor, d: Tensor) -> Tensor:
        s = t.exp()
        x = (h * v["n.weight"] + v["n.bias"] - d * unit) / s
        y = h * v["n.weight"] + v["n.bias"]
        out = x @ clipped(w, g, b, s).T + v["a.bias"] + w @ (d * unit)
        return (out - (y @ w.T + v["a.bias"])).square().mean()

    before = loss(g, b, t, d)
    slopes = torch.autograd.grad(before, [g, b, t, d])
    rates = (0.5, 0.5, 0.02, 0.02)
    with torch.no_grad():
        moved = [p - rate * slope.sign() for p, rate, slope in zip((g, b, t, d), rates, slopes, strict=True)]
        after = loss(*moved)
    assert after < before
    assert done.end == pytest.approx(float(after), rel=1e-4)
    shift, scale = done.folds
    assert isinstance(shift, ShiftFold)
    assert isinstance(scale, ScaleFold)
    torch.testing.assert_close(scale.scale.double(), moved[2].exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(shift.shift.double(), moved[3] * unit, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        done.layers["a"].decode().double(), clipped(w, moved[0], moved[1], moved[2].exp()), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(done.layers["a"].weight, w.float() * scale.scale)


def test_scales_and_shifts_begin_at_the_identity_and_pay(tmp_path: Path) -> None:
    block, io, _, _, _ = normed(tmp_path)
    both = []
    for let in ("none", "all"):
        shared = {"batch": 4, "start": "minmax", "weigh": "alike", "let": let}
        still, moved = (
            omniquant.fit(block, io, {"a": TARGET}, omniquant.Options.model_validate({**shared, "iters": n}))
            for n in (0, 60)
        )
        assert moved.end < moved.start
        both.append((still, moved))
    assert torch.equal(both[0][0].layers["a"].decode(), both[1][0].layers["a"].decode())
    assert [type(x) for x in both[1][0].folds] == [ShiftFold, ScaleFold]
    shift, scale = both[1][0].folds
    assert not bool(shift.shift.any())  # type: ignore[union-attr]
    assert bool((scale.scale == 1).all())  # type: ignore[union-attr]
    assert both[0][1].folds == ()
    assert both[1][1].end < both[0][1].end
    coded = {"a": both[0][0].layers["a"]}
    with pytest.raises(PlanError, match="let: none"):
        omniquant.fit(replace(block, layers=coded), io, {"a": TARGET}, omniquant.Options(let="norm"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_folder_holds_what_the_folds_have_moved(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Scales and shifts of norms, values and hidden channels; the engine's own reader runs what was written."""
    model = tf.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    with torch.no_grad():
        for tensor, value in model.named_parameters():
            if tensor.endswith((".input_layernorm.weight", ".ln_1.weight", ".ln_2.weight")):
                value[[5, 17, 40]] *= 15  # channels that stand out
    model.save_pretrained(tmp_path / "source")
    for x in tiny(name).iterdir():
        if not (tmp_path / "source" / x.name).exists():
            (tmp_path / "source" / x.name).write_bytes(x.read_bytes())
    ends = {}
    for let in ("none", "all"):
        steps = (
            "{method: act-static-dynamic, target: {bits: 4}}",
            f"{{method: omniquant, target: {{bits: 4, group_size: 16}}, options: {{iters: 60, let: {let}}}}}",
        )
        recipe = "export: lilliput\nsteps:\n" + "".join(f"  - {x}\n" for x in steps)
        done = api.compress(
            tmp_path / "source", tmp_path / let, recipe=recipe, samples=16, tokens=64, eval_windows=0, progress=Quiet()
        )
        ends[let] = done.rows[0]["block_loss"]
    assert ends["all"][0] == ends["none"][0]
    assert ends["all"][1] < ends["none"][1]
    before, after = (open_model(tmp_path / x) for x in ("source", "all"))
    gains = [x for x in before.skeleton.names_of(0) if x.endswith((".input_layernorm.weight", ".ln_1.weight"))]
    assert len(gains) == 1
    assert float((after.read(gains[0]) / before.read(gains[0]) - 1).abs().max()) > 0.1


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
