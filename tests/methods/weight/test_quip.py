"""QuIP against its steps in float64, and what its turns and passes are worth."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.algebra import lattice, ldlq, obs
from lilliput.errors import LilliputError, PlanError
from lilliput.methods.weight import gptq, quip
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import of
from lilliput.parts.transform import Scale
from lilliput.stats.site import SiteStats
from lilliput.target import Target

CODED = [("e8", 2), ("vector", 2), ("trellis", 2), ("trellis-half", 2)]


def _case(rows: int = 32, width: int = 48, seed: int = 0) -> tuple[Tensor, SiteStats]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    x = torch.randn(400, width, generator=g) @ mix / width**0.5
    w = torch.randn(rows, width, generator=g) * 0.05
    w[3, 4] = 2.0
    return w, SiteStats(width, 400, gram=x.T @ x)


def _target(form: str = "int", bits: int = 2, group: int | str = "tensor") -> Target:
    return Target.model_validate({"format": form, "bits": bits, "group_size": group, "scale_dtype": "float32"})


def _run(w: Tensor, stats: SiteStats, target: Target, **options: Any) -> Layer:
    return quip.compress(Layer("x", w), stats, target, quip.Options.model_validate({"shrinkage": 0.0, **options}))


def _loss(layer: Layer, stats: SiteStats) -> float:
    return lattice.loss(stats.need("gram"), (layer.weight - layer.decode()).T)


def _part(layer: Layer) -> QuantizedPart:
    (part,) = layer.parts
    assert isinstance(part, QuantizedPart)
    return part


def test_without_turns_and_scales_it_is_ldlq() -> None:
    w, stats = _case()
    for bits, group in ((2, 16), (4, "channel")):
        target = _target("int", bits, group)
        ours = _run(w, stats, target, turn="none", diagonal=False, refine=0)
        theirs = gptq.compress(Layer("x", w), stats, target, gptq.Options(act_order=False, shrinkage=0.0))
        assert of(ours).inputs == of(ours).outputs == ()
        assert torch.equal(_part(ours).codes, _part(theirs).codes)


@pytest.mark.parametrize("turn", ["hadamard", "kronecker"])
def test_the_weight_comes_back_and_the_loss_is_the_same_between_the_turns(turn: str) -> None:
    w, stats = _case()
    layer = _run(w, stats, _target("e8"), turn=turn, refine=0)
    bare = Layer("x", w).between(layer.inputs, layer.outputs)
    turned, through = bare.rest(), stats.through(layer.inputs)
    assert float(turned.abs().max() / turned.square().mean().sqrt()) < 0.5 * float(
        w.abs().max() / w.square().mean().sqrt()
    )
    miss = turned - _part(layer).decode()
    torch.testing.assert_close(lattice.loss(through.need("gram"), miss.T), _loss(layer, stats), rtol=1e-3, atol=0)


def test_the_scales_balance_weights_and_inputs() -> None:
    w, stats = _case()
    gram = stats.need("gram").double()
    scale = _run(w, stats, _target("e8"), refine=0).inputs[0]
    assert isinstance(scale, Scale)
    s = (gram.diagonal() / w.double().square().sum(0)) ** 0.25
    expected = s.log().mean().exp() / s
    torch.testing.assert_close(scale.factor.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("form", "bits"), CODED)
def test_the_sweep_is_the_printed_one(form: str, bits: int) -> None:
    """what_k = Q(w_k + sum_{i<k} (w_i - what_i) T_ik) in float64: the same codes but for ties (1 in 100)."""
    w, stats = _case()
    layer = _run(w, stats, _target(form, bits), refine=0)
    part = _part(layer)
    turned = Layer("x", w).between(layer.inputs, layer.outputs).rest().double()
    gram = stats.through(layer.inputs).need("gram").double()
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    lower = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # h = upper upperT
    coupling = lower / lower.diagonal()
    value, codes = torch.zeros_like(turned), torch.zeros(turned.shape, dtype=torch.int32)
    for k in range(48):
        aim = turned[:, k] + (turned[:, :k] - value[:, :k]) @ coupling[:k, k]
        codes[:, k] = part.format.encode(aim[:, None].float(), part.grid)[:, 0]
        value[:, k] = part.format.decode(codes[:, k : k + 1], part.grid)[:, 0].double()
    assert float((codes != part.codes).double().mean()) < 0.01


@pytest.mark.parametrize(("form", "bits"), [*CODED, ("int", 2)])
def test_refining_never_raises_the_loss(form: str, bits: int) -> None:
    w, stats = _case()
    gram = stats.need("gram")
    losses = []
    for passes in range(3):
        layer = _run(w, stats, _target(form, bits), refine=passes, diagonal=False, damping=1e-4)
        losses.append(lattice.loss(gram + 1e-4 * gram.diagonal().mean() * torch.eye(48), (w - layer.decode()).T))
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(losses))
    assert losses[1] < losses[0]


def test_a_column_is_polished_to_its_best_value() -> None:
    w, stats = _case(rows=6, width=5)
    gram = stats.need("gram")
    grid = torch.linspace(-2, 2, 9)

    def nearest(column: Tensor) -> tuple[Tensor, Tensor]:
        code = (column[:, None] - grid).abs().argmin(1)
        return code, grid[code]

    columns, codes = w.T.contiguous(), torch.zeros(5, 6, dtype=torch.int64)
    settle = ldlq.by_column(nearest)
    deviation = ldlq.sweep(columns, obs.factorize(gram), settle, codes)
    for _ in range(20):
        ldlq.polish(columns, deviation, gram, 0.0, settle, codes)
    torch.testing.assert_close(columns - deviation, grid[codes], atol=1e-5, rtol=0)
    base = lattice.loss(gram, deviation)
    for j, i, move in itertools.product(range(5), range(6), range(9)):
        tried = deviation.clone()
        tried[j, i] = columns[j, i] - grid[move]
        assert lattice.loss(gram, tried) >= base * (1 - 1e-5)


def test_each_step_is_worth_something_at_two_bits() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(800, 64, generator=g) @ torch.randn(64, 64, generator=g) / 8
    # Heavy tails, as real weights have them; one scale for each row or for all: 2 to 2.5 bits with everything.
    w = torch.randn(64, 64, generator=g) * torch.exp(0.8 * torch.randn(64, 64, generator=g))
    stats = SiteStats(64, 800, gram=x.T @ x)
    integers = gptq.Options(shrinkage=0.0, refine=3)
    plain = _loss(gptq.compress(Layer("x", w), stats, _target("int", 2, "channel"), integers), stats)
    forms = ("e8", "trellis", "trellis-half")
    unturned, turned = (
        [_loss(_run(w, stats, _target(form), turn=turn, diagonal=False), stats) for form in forms]
        for turn in ("none", "hadamard")
    )
    assert all(a > 1.2 * b for a, b in zip(unturned, turned, strict=True))
    assert plain > 2 * turned[0]
    assert turned[1] > 1.5 * turned[2]


@pytest.mark.parametrize(("form", "bits"), [*CODED, ("int", 2)])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 13), (5, 30), (16, 2)])
@pytest.mark.parametrize("unit", ["tensor", "channel"])
def test_any_shape_and_any_gram_matrix(form: str, bits: int, rows: int, width: int, unit: str) -> None:
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(5, 2, generator=g) @ torch.randn(2, width, generator=g)
    x[:, 0] = 0
    for gram in (x.T @ x, torch.zeros(width, width)):
        for w in (torch.randn(rows, width, generator=g), torch.full((rows, width), 0.25), torch.zeros(rows, width)):
            layer = _run(w, SiteStats(width, 5, gram=gram), _target(form, bits, unit), shrinkage=0.2)
            assert layer.decode().shape == w.shape
            assert bool(torch.isfinite(layer.decode()).all())
            made = quip.scheme(_target(form, bits, unit), quip.Options(), rows, width)
            assert of(layer).inputs[-1:] == made.inputs[-1:]
            assert {n: (t.dtype, tuple(t.shape)) for n, t in made.pack(layer).items()} == made.stored(rows, width)


def test_masks_and_what_is_no_number_are_refused() -> None:
    w, stats = _case()
    with pytest.raises(PlanError, match="a mask does not survive"):
        quip.compress(Layer("x", w, support=w > 0), stats, _target("e8"), quip.Options())
    for form, bits in (*CODED, ("int", 4)):
        for turn in ("hadamard", "none"):
            for diagonal in (True, False):
                broken = w.clone()
                broken[0, 0] = float("nan")
                with pytest.raises(LilliputError, match="NaN or infini"):
                    _run(broken, stats, _target(form, bits), turn=turn, diagonal=diagonal)
                ill = SiteStats(48, 9, gram=torch.full((48, 48), float("inf")))
                with pytest.raises(LilliputError, match="NaN or infini"):
                    _run(w, ill, _target(form, bits), turn=turn, diagonal=diagonal)


def test_the_papers_range_is_one_for_the_matrix() -> None:
    """Levels -r + 2 r k / (2^b - 1), r = 2.4 root mean squares of the turned weight, to half a unit of float32."""
    w, stats = _case()
    for bits in (2, 3):
        layer = _run(w, stats, _target("affine", bits, "channel"), turn="kronecker", search="rms", refine=0)
        part = _part(layer)
        turned = Layer("x", w).between(layer.inputs, layer.outputs).rest().double()
        reach = 2.4 * float(turned.square().mean().sqrt())
        wanted = torch.linspace(-reach, reach, 1 << bits, dtype=torch.float64)
        found = part.decode().double().unique()
        far = (found[:, None] - wanted).abs().amin(1)
        assert float(far.max()) < 1e-5 * reach
        assert len(found) > 1
        assert {float(x) for x in part.grid.scale.unique()} == {float(part.grid.scale[0, 0])}


def test_the_papers_range_asks_for_levels_beside_0() -> None:
    with pytest.raises(PlanError, match=r"set target\.format to affine"):
        quip.scheme(_target("int", 2), quip.Options(search="rms"), 32, 48)


def test_integers_with_nested_scales_are_swept_as_well() -> None:
    w, stats = _case()
    target = Target(bits=3, group_size=16, scale_dtype="int6/16")
    layer = _run(w, stats, target)
    assert _part(layer).format.describe().startswith("int3 g16 sym int6/16")
    assert _loss(layer, stats) < _loss(_run(w, stats, target, shrinkage=10.0, refine=0), stats)
