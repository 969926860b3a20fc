"""QLLM's splits and merges: exact where nothing is lost, and the printed costs in loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import lilliput  # noqa: F401 - registers the layout with transformers
from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods.weight import qllm, rtn
from lilliput.model.stored import open_model
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.layer import Layer
from lilliput.parts.reassembled import Reassembled
from lilliput.progress import Quiet
from lilliput.runtime.inputs import Rounding
from lilliput.stats import fold
from lilliput.stats.site import SiteStats
from lilliput.streaming.walk import last_hidden
from lilliput.target import Target

Tiny = Callable[[str], Path]
WIDTH = 40


def case() -> tuple[Tensor, Tensor, SiteStats]:
    """One channel is large, and channels 20 and 21 are the same."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, WIDTH, generator=g)
    x[:, 7] *= 8
    x[:, 21] = x[:, 20]
    w = torch.randn(16, WIDTH, generator=g)
    return x, w, fold.finish(fold.update(fold.init(WIDTH, ("gram", "absmax")), x))


def made(x: Tensor, w: Tensor, stats: SiteStats, **options: Any) -> tuple[Layer, Reassembled]:
    layer = qllm.compress(Layer("x", w), stats, Target(), qllm.Options.model_validate(options))
    (transform,) = layer.inputs
    assert isinstance(transform, Reassembled)
    return layer, transform


def test_splits_alone_and_merges_of_equals_are_exact() -> None:
    """Channel 0 three times, channels 4 and 5 as one, and 6 and 7, which are equal."""
    source = torch.tensor([0, 0, 0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int32)
    place = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6, 7, 7], dtype=torch.int32)
    t = Reassembled(source, place, 8)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(20, 8, generator=g).double(), torch.randn(5, 8, generator=g).double()
    x[:, 5], x[:, 7] = x[:, 4], x[:, 6]
    expected = torch.stack([x[:, 0] / 3] * 3 + [x[:, n] for n in (1, 2, 3, 4, 6)], 1)
    torch.testing.assert_close(t.apply(x), expected)
    columns = torch.stack([w[:, 0]] * 3 + [w[:, 1], w[:, 2], w[:, 3], w[:, 4] + w[:, 5], w[:, 6] + w[:, 7]], 1)
    torch.testing.assert_close(t.undo_adjoint(w), columns)
    torch.testing.assert_close(t.apply(x) @ t.undo_adjoint(w).T, x @ w.T)
    torch.testing.assert_close(t.undo(t.apply(x)), x)
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(t.undo(eye).T, torch.linalg.pinv(t.apply(eye).T))
    torch.testing.assert_close(t.adjoint(columns), columns @ t.apply(torch.eye(8, dtype=torch.float64)).T)


def test_costs_and_pairs_are_those_of_the_equations() -> None:
    x, w, stats = case()
    cost = qllm._costs(w, stats)
    for i, j in ((0, 1), (20, 21), (7, 30)):
        out = torch.outer((x[:, i] - x[:, j]).double(), (w[:, i] - w[:, j]).double()) / 2
        torch.testing.assert_close(float(cost[i, j]), float(out.square().sum(1).mean()), rtol=1e-3, atol=1e-4)
    counts = torch.ones(WIDTH, dtype=torch.int64)
    counts[7] = 3
    pairs = qllm._matched(cost, counts, 2)
    assert pairs is not None
    assert len({n for pair in pairs for n in pair}) == 4
    assert all(7 not in pair for pair in pairs)
    assert tuple(sorted(pairs[0])) == (20, 21)  # free
    assert qllm._matched(cost, counts, 30) is None


def test_the_largest_input_is_split_at_the_same_width() -> None:
    x, w, stats = case()
    layer, t = made(x, w, stats)
    most = qllm.extra(WIDTH, qllm.Options())
    assert t.spec.extra == most == 2
    copies = t.source[t.source >= 0].bincount(minlength=WIDTH)
    assert int(copies[7]) > 1
    assert int((t.place[t.source >= 0]).max()) == WIDTH - 1
    assert float(t.apply(x).abs().max()) < 0.6 * float(x.abs().max())
    target = Target.model_validate({"bits": 8, "group_size": "channel", "scale_dtype": "float32"})
    grid, exact = InputGrid(UniformInput(4)), w @ x.T

    def lost(start: Layer) -> float:
        done = rtn.compress(start, SiteStats(WIDTH, 0), target, rtn.Options(search="minmax"))
        return float((done.decode() @ Rounding(grid, start.inputs).of(x).T - exact).norm() / exact.norm())

    assert lost(layer) < 0.9 * lost(Layer("x", w))
    even = x.sign()
    same, plain = made(even, w, fold.finish(fold.update(fold.init(WIDTH, ("gram", "absmax")), even)))
    assert torch.equal(plain.apply(even), even)  # nothing stands out
    torch.testing.assert_close(same.rest(), w)


@pytest.mark.slow
def test_a_folder_computes_the_same_everywhere(tiny: Tiny, tmp_path: Path) -> None:
    steps = (
        "  - {method: qllm}\n  - {method: gptq, target: {bits: 8, group_size: channel}}\n"
        "  - {method: act-static-dynamic, target: {bits: 8}}\n"
    )
    api.compress(
        tiny("qwen2"), tmp_path / "out", recipe=f"export: lilliput\nsteps:\n{steps}", samples=4, tokens=32,
        eval_windows=0, dtype="float32", progress=Quiet(),
    )  # fmt: skip
    ids = torch.arange(2, 34).view(1, -1)
    with torch.no_grad():
        theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    model = open_model(tmp_path / "out")
    states = last_hidden(model, ids, tmp_path)
    model.load(model.skeleton.final)
    model.load([model.skeleton.head])
    ours = model.skeleton.logits(model.skeleton.finish(states.read(0, 1)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("rounding", "told"),
    [
        ("{method: act-static-dynamic, target: {bits: 8, group_size: 16}}", "int8 g16"),
        ("{method: minifloat, target: {format: mxfp8}}", "depend on the channel's place"),
        ("{method: olive}", "depend on the channel's place"),
    ],
)
def test_copies_that_would_be_rounded_by_their_place_are_refused(
    tiny: Tiny, tmp_path: Path, rounding: str, told: str
) -> None:
    """Two copies of a channel in two groups would become different values, and add up to another than theirs."""
    steps = f"  - {{method: qllm}}\n  - {{method: gptq, target: {{bits: 8, group_size: channel}}}}\n  - {rounding}\n"
    with pytest.raises(PlanError, match=told) as error:
        api.compress(
            tiny("qwen2"), tmp_path / "out", recipe=f"export: lilliput\nsteps:\n{steps}", samples=4, tokens=32,
            eval_windows=0, progress=Quiet(),
        )  # fmt: skip
    assert "have to be rounded alike" in str(error.value)
    assert not (tmp_path / "out").exists()
