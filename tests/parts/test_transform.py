"""Run-time transforms: orthogonal, undone exactly, consistent with the statistics, and read back from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lilliput import api
from lilliput.model.stored import open_model
from lilliput.parts import transform
from lilliput.parts.dense import DensePart
from lilliput.parts.layer import Layer
from lilliput.parts.linear import LinearSpec, decode, parse_config, plain_config
from lilliput.parts.scheme import of
from lilliput.parts.transform import Rotation, Scale, hadamard_order
from lilliput.progress import Quiet
from lilliput.runtime.linear import CompressedLinear
from lilliput.stats import fold

KINDS = ("hadamard", "kronecker")
WIDTHS = (1, 2, 7, 48, 61, 90, 96, 112, 576)  # one, odd, prime, with and without a whole Hadamard transform


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scale(width: int) -> Scale:
    return Scale((randn(width, seed=9).abs() + 0.2).half())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_rotations_are_orthogonal_and_their_own_inverse_transposed(kind: str, width: int) -> None:
    t = Rotation(kind, 3)  # type: ignore[arg-type]
    eye = torch.eye(width, dtype=torch.float64)
    matrix = t.apply(eye)  # rows are T e_j: the transpose of T
    torch.testing.assert_close(matrix @ matrix.T, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(t.adjoint(eye), matrix.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(t.undo(t.apply(eye)), eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(t.undo_adjoint(eye), matrix, atol=1e-12, rtol=0)
    assert torch.equal(t.apply(eye), Rotation(kind, 3).apply(eye))  # type: ignore[arg-type]
    if width > 2:
        assert not torch.equal(t.apply(eye), Rotation(kind, 4).apply(eye))  # type: ignore[arg-type]


def test_every_entry_meets_every_other_where_no_hadamard_transform_is_wide_enough() -> None:
    assert [hadamard_order(n) for n in (1, 61, 576, 112, 90, 896)] == [1, 1, 576, 16, 2, 128]
    for width in (61, 90, 112, 896):
        matrix = Rotation("hadamard", 0).apply(torch.eye(width, dtype=torch.float64))
        assert int((matrix.abs() > 1e-9).sum()) > 0.9 * width * width


@pytest.mark.parametrize("kind", KINDS)
def test_a_spike_is_spread(kind: str) -> None:
    w = randn(112, 576)
    w[3, 5] = 100.0
    turned = transform.turn(w, (Rotation(kind, 0),), (Rotation(kind, 1),))  # type: ignore[arg-type]
    assert float(turned.abs().max() / turned.square().mean().sqrt()) < 12
    assert float(w.abs().max() / w.square().mean().sqrt()) > 70


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(7, 96), (96, 61), (1, 1), (48, 90)])
def test_turning_keeps_outputs_and_loss_and_turns_back(kind: str, rows: int, width: int) -> None:
    w, x = randn(rows, width), randn(300, width, seed=1)
    inputs = (scale(width), Rotation(kind, 5))  # type: ignore[arg-type]
    outputs = (Rotation(kind, 6),)  # type: ignore[arg-type]
    turned = transform.turn(w, inputs, outputs)
    torch.testing.assert_close(transform.turn_back(turned, inputs, outputs), w, atol=1e-5, rtol=1e-4)
    seen = x
    for t in inputs:
        seen = t.apply(seen)
    torch.testing.assert_close(outputs[0].undo(seen @ turned.T), x @ w.T, atol=1e-4, rtol=1e-4)
    stats = fold.finish(fold.update(fold.init(width, fold.NAMES), x))
    through = stats.through(inputs)
    torch.testing.assert_close(through.need("gram"), seen.T @ seen, atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(through.need("square"), seen.square().sum(0), atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(through.need("mean"), seen.mean(0), atol=1e-5, rtol=1e-4)
    assert through.absmax is None
    assert through.count == 300
    miss = randn(rows, width, seed=2)
    before = ((miss @ stats.need("gram")) * miss).sum()
    between = transform.turn(miss, inputs, outputs)
    torch.testing.assert_close(((between @ through.need("gram")) * between).sum(), before, rtol=1e-4, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_files_hold_them_exactly(transposed: bool) -> None:
    w = randn(24, 90)
    layer = Layer("x", w).between((scale(90), Rotation("kronecker", 2)), (Rotation("hadamard", 1),))
    layer = layer.with_part(DensePart(layer.rest()))
    spec = LinearSpec("x", "x", 24, 90, of(layer), transposed)
    again = parse_config(plain_config({"x": spec}))["x"]
    assert again == spec
    tensors = {f"x.weight{n}": t for n, t in spec.scheme.pack(layer).items()}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == spec.describe()
    assert torch.equal(decode(again, tensors.__getitem__), layer.decode())
    assert spec.scheme.size_bits(24, 90) == 24 * 90 * 32 + 90 * 16


RECIPE = """
steps:
  - method: quip
    target: {format: FORMAT, bits: 2, group_size: tensor}
    options: {refine: 0}
    where: {include: ["*.0.*"]}
"""


@pytest.mark.parametrize(("model", "form"), [("gpt2", "vector"), ("mixtral", "e8"), ("qwen2", "trellis-half")])
def test_transformers_runs_them(tiny: Callable[[str], Path], tmp_path: Path, model: str, form: str) -> None:
    """Conv1D, batched experts and biases: the loaded model has the weights that the folder says."""
    (tmp_path / "r.yaml").write_text(RECIPE.replace("FORMAT", form))
    out = tmp_path / "out"
    api.compress(
        tiny(model),
        out,
        recipe=str(tmp_path / "r.yaml"),
        samples=2,
        tokens=32,
        device="cpu",
        dtype="float32",
        eval_windows=0,
        progress=Quiet(),
    )
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    packed = {n: m for n, m in loaded.named_modules() if isinstance(m, CompressedLinear)}
    turned = [m.spec for m in packed.values() if m.spec.scheme.inputs and m.spec.scheme.outputs]
    assert len(turned) >= 4  # experts that stay dense are packed too
    written = open_model(str(out))
    with torch.no_grad():
        logits = loaded(torch.arange(8)[None]).logits
        if model == "mixtral":
            for m in packed.values():
                assert torch.equal(m.weight, written.read(f"{m.spec.name}.weight"))
        else:
            dense = AutoModelForCausalLM.from_pretrained(tiny(model), dtype=torch.float32).eval()
            for name in packed:
                dense.get_submodule(name).weight.copy_(written.read(f"{name}.weight"))
            assert torch.equal(dense(torch.arange(8)[None]).logits, logits)
    assert bool(torch.isfinite(logits).all())
