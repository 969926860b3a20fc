"""What every grid for inputs promises: what the plan knew, the same bytes, and a folder that rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

import lilliput  # noqa: F401 - registers the layout with transformers
from lilliput import api
from lilliput.errors import LilliputError, SourceError
from lilliput.methods import discover
from lilliput.model.stored import open_model
from lilliput.parts.inputs import known
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.run.drivers.inputs import DRIVER
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.streaming.walk import last_hidden
from lilliput.target import Target
from lilliput.verbs.inputs import Inputs
from lilliput.verbs.spec import Method, Task

METHODS = [x for x in discover().values() if isinstance(x.spec, Inputs)]
Tiny = Callable[[str], Path]
WIDTH = 64


def made(method: Method, x: Tensor) -> object:
    stats = fold.finish(fold.update(fold.init(x.shape[-1], fold.NAMES), x))
    weight = torch.randn(24, x.shape[-1], generator=torch.Generator().manual_seed(1))
    target = method.spec.completed(Target())
    return method.spec.run(Layer("x", weight), stats, target, method.parse({}))  # type: ignore[attr-defined]


def drawn(seed: int) -> Tensor:
    """[samples, tokens, width], with channels of uneven size, as in all draws, a dead one and a token of zeros."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(WIDTH, generator=torch.Generator().manual_seed(7)))
    x = torch.randn(6, 40, WIDTH, generator=draw) * spread
    x[..., 5] = 0.0
    x[0, 3] = 0.0
    return x


@pytest.mark.parametrize("method", METHODS, ids=lambda x: x.name)
def test_a_grid_is_what_the_plan_knew_and_repeats(method: Method) -> None:
    x = drawn(0)
    before = x.clone()
    one, two = made(method, x), made(method, x)
    spec = method.spec.spec(method.spec.completed(Target()), method.parse({}), WIDTH)  # type: ignore[attr-defined]
    assert one.spec == spec  # type: ignore[attr-defined]
    assert known.from_plain(json.loads(json.dumps(spec.plain()))) == spec
    packed = one.pack()  # type: ignore[attr-defined]
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.items()} == spec.stored(WIDTH)
    assert all(torch.equal(t, two.pack()[name]) for name, t in packed.items())  # type: ignore[attr-defined]
    assert torch.equal(x, before)


@pytest.mark.parametrize("method", METHODS, ids=lambda x: x.name)
def test_rounding_is_close_keeps_zeros_and_passes_gradients(method: Method) -> None:
    grid, x = made(method, drawn(0)), drawn(1)
    rounded = grid.round(x)  # type: ignore[attr-defined]
    assert rounded.dtype == x.dtype
    assert 0 < float((rounded - x).norm() / x.norm()) < 0.3
    assert bool((rounded[0, 3] == 0).all())
    again = x.clone().requires_grad_()
    grid.round(again).sum().backward()  # type: ignore[attr-defined]
    assert torch.equal(again.grad, torch.ones_like(x))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda x: x.name)
def test_a_folder_rounds_in_transformers_as_in_our_own_reader(method: Method, tiny: Tiny, tmp_path: Path) -> None:
    recipe = "export: lilliput\nsteps:\n  - {method: rtn, target: {bits: 8, group_size: channel}}\n"
    api.compress(
        tiny("qwen2"), tmp_path / "plain", recipe=recipe, samples=2, tokens=32, eval_windows=0, progress=Quiet()
    )
    api.compress(
        tiny("qwen2"),
        tmp_path / "out",
        recipe=f"{recipe}  - {{method: {method.name}}}",
        samples=2,
        tokens=32,
        eval_windows=0,
        progress=Quiet(),
    )
    ids = torch.arange(2, 34).view(1, -1)
    with torch.no_grad():
        theirs, plain = (
            tf.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
            for name in ("out", "plain")
        )
    model = open_model(tmp_path / "out")
    states = last_hidden(model, ids, tmp_path)
    model.load(model.skeleton.final)
    model.load([model.skeleton.head])
    ours = model.skeleton.logits(model.skeleton.finish(states.read(0, 1)))
    # Sums in another order move single inputs across the edge between two codes.
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-3
    assert float((theirs - plain).norm() / plain.norm()) > 1e-4


@pytest.mark.parametrize("method", METHODS, ids=lambda x: x.name)
def test_a_broken_input_shows(method: Method) -> None:
    grid, x = made(method, drawn(0)), drawn(1)
    x[2, 7, 9] = float("nan")
    rounded = grid.round(x)  # type: ignore[attr-defined]
    assert bool(rounded[2, 7].isnan().any())
    assert not bool(rounded[:2].isnan().any())


@pytest.mark.parametrize("method", METHODS, ids=lambda x: x.name)
@pytest.mark.parametrize("wrong", [float("inf"), -float("inf"), float("nan")])
def test_what_calibration_cannot_measure_is_refused(method: Method, wrong: float) -> None:
    task = Task(0, method, method.spec.completed(Target()), method.parse({}))
    x = drawn(0)
    x[1, 2, 3] = wrong
    state = fold.update(fold.init(WIDTH, task.needs), x)
    if not task.needs:
        return
    with pytest.raises(SourceError, match=r"block\.site: its inputs hold NaN, infinity"):
        fold.complete(state, "block.site", torch.float32)
    with pytest.raises(LilliputError, match="no calibration token reaches x"):
        DRIVER.run(task, Layer("x", torch.zeros(4, WIDTH)), SiteStats(WIDTH, 0))
