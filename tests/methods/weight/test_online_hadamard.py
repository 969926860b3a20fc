"""An online Hadamard transform: exact where nothing is rounded, and rounded in between where inputs are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

import lilliput  # noqa: F401 - registers the layout with transformers
from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods.weight import gptq, online_hadamard
from lilliput.model.stored import open_model
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.parts.layer import Layer
from lilliput.parts.transform import Rotation, pull, turn_back
from lilliput.progress import Quiet
from lilliput.run.result import Compression
from lilliput.runtime import inputs
from lilliput.runtime.inputs import Rounding
from lilliput.stats import fold
from lilliput.streaming.walk import last_hidden
from lilliput.target import Target

Tiny = Callable[[str], Path]
INT4 = Target.model_validate({"bits": 4, "group_size": "channel", "scale_dtype": "float32"})
ROUNDED = "- {method: act-static-dynamic, target: {bits: 4, symmetric: false}}"
CODED = "- {method: gptq, target: {bits: 4, group_size: channel}}"


def matrix(width: int, seed: int = 0) -> Tensor:
    """R, float64: what the transform makes of unit vectors."""
    return Rotation("hadamard", seed).apply(torch.eye(width, dtype=torch.float64)).T


@pytest.mark.parametrize("width", [16, 48, 72])
def test_the_transform_is_orthogonal_and_the_layer_is_what_it_was(width: int) -> None:
    r = matrix(width)
    torch.testing.assert_close(r @ r.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    w = torch.randn(8, width, generator=torch.Generator().manual_seed(1))
    x = torch.randn(30, width)
    stats = fold.finish(fold.update(fold.init(width, ("gram",)), x))
    layer = online_hadamard.compress(Layer("x", w), stats, Target(), online_hadamard.Options())
    assert torch.equal(layer.decode(), w)
    torch.testing.assert_close(layer.rest().double(), w.double() @ r.T, rtol=0, atol=1e-5)


def test_a_later_step_works_in_the_turned_space() -> None:
    """gptq between the transforms is gptq of W R^T on inputs R x."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 48, generator=g), torch.randn(200, 48, generator=g) * torch.exp(torch.randn(48, generator=g))
    stats = fold.finish(fold.update(fold.init(48, ("gram",)), x))
    layer = online_hadamard.compress(Layer("x", w), stats, Target(), online_hadamard.Options())
    out = gptq.compress(layer, stats.through(layer.inputs), INT4, gptq.Options())
    r = matrix(48).float()
    turned = fold.finish(fold.update(fold.init(48, ("gram",)), x @ r.T))
    alone = gptq.compress(Layer("x", w @ r.T), turned, INT4, gptq.Options())
    torch.testing.assert_close(out.decode(), alone.decode() @ r, rtol=0, atol=2e-3)


def test_inputs_are_rounded_behind_the_transform() -> None:
    r, x = matrix(48), torch.randn(10, 48, generator=torch.Generator().manual_seed(2))
    x[:, 7] *= 50
    grid = InputGrid(UniformInput(4))
    rounded = Rounding(grid, (Rotation("hadamard", 0),)).of(x)
    scale = (x.double() @ r.T).abs().amax(1, keepdim=True) / 7.5
    expected = ((x.double() @ r.T) / scale).round().clamp(-8, 7) * scale @ r
    torch.testing.assert_close(rounded.double(), expected, rtol=0, atol=1e-4)
    assert float((rounded - x).norm()) < 0.5 * float((grid.round(x) - x).norm())  # what it is for


def test_gradients_go_back_through_transforms() -> None:
    inputs, outputs = (Rotation("hadamard", 1),), (Rotation("kronecker", 2),)
    p = torch.randn(12, 20, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(12, 20, dtype=torch.float64)
    (turn_back(p, inputs, outputs) * slope).sum().backward()
    torch.testing.assert_close(pull(slope, inputs, outputs), p.grad)


def write(model: Path, out: Path, *steps: str) -> Compression:
    recipe = "export: lilliput\nsteps:\n" + "".join(f"  {x}\n" for x in steps)
    return api.compress(
        model, out, recipe=recipe, samples=4, tokens=32, eval_windows=0, dtype="float32", progress=Quiet()
    )


def ours(folder: Path, ids: Tensor, work: Path) -> Tensor:
    model = open_model(folder)
    states = last_hidden(model, ids, work)
    model.load(model.skeleton.final)
    model.load([model.skeleton.head])
    return model.skeleton.logits(model.skeleton.finish(states.read(0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_folder_computes_the_same_everywhere_and_the_plain_model_alone(tiny: Tiny, tmp_path: Path, name: str) -> None:
    ids = torch.arange(2, 34).view(1, -1)

    def theirs(folder: Path) -> Tensor:
        with torch.no_grad():
            return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits

    before = theirs(tiny(name))
    atol = 1e-4 * float(before.abs().max())
    online = "- {method: online-hadamard, options: {roles: [down, o]}}"
    write(tiny(name), tmp_path / "alone", online)
    torch.testing.assert_close(theirs(tmp_path / "alone"), before, rtol=0, atol=atol)
    fine = ROUNDED.replace("bits: 4", "bits: 8")
    logits: dict[str, Tensor] = {}
    for label, steps in {"a8": (online, fine), "a4": (online, ROUNDED), "w4a4": (online, CODED, ROUNDED)}.items():
        write(tiny(name), tmp_path / label, *steps)
        logits[label] = theirs(tmp_path / label)
        torch.testing.assert_close(ours(tmp_path / label, ids, tmp_path), logits[label], rtol=0, atol=atol)
    off = {label: float((x - before).norm() / before.norm()) for label, x in logits.items()}
    assert 0 < off["a8"] < 0.05 < off["a4"] < off["w4a4"] * 1.2
    # Without the grid the transform in the folder is still exact.
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "a8", dtype=torch.float32)
    turned = [found for x in model.modules() if (found := inputs.of(x)) is not None and found.transforms]
    assert len(turned) == 2 * model.config.num_hidden_layers
    for module in model.modules():
        inputs.detach(module)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=atol)


@pytest.mark.slow
def test_a_fit_trains_between_the_transforms(tiny: Tiny, tmp_path: Path) -> None:
    fit = (
        "- {method: signround, target: {bits: 3, group_size: channel}, options: {iters: 20}, where: {include: [down]}}"
    )
    done = write(tiny("llama"), tmp_path / "fit", "- {method: online-hadamard}", fit)
    rows = [x for x in done.rows if "block_loss" in x]
    assert len(rows) == 4
    for row in rows:
        start, end = row["block_loss"]
        assert end < 0.97 * start


@pytest.mark.slow
def test_zeros_and_transforms_exclude_each_other(tiny: Tiny, tmp_path: Path) -> None:
    online, wanda = "- {method: online-hadamard}", "- {method: wanda, target: {sparsity: 0.5}}"
    with pytest.raises(PlanError, match="does not survive"):
        write(tiny("llama"), tmp_path / "a", online, wanda)
    with pytest.raises(PlanError, match="fill the zeros"):
        write(tiny("llama"), tmp_path / "b", wanda, online)
