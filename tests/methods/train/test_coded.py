"""What is trained of linears that are codes: identity at the start, the folder's layer at the end, and what stays."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.formats.binary import BinaryFormat
from lilliput.formats.format import Format
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.known import from_target
from lilliput.formats.sign import SignFormat
from lilliput.formats.ternary import TernaryFormat
from lilliput.methods import get
from lilliput.parts import scheme as schemes
from lilliput.parts.layer import Layer
from lilliput.parts.lowrank import plain_factors
from lilliput.parts.part import Part
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.transform import Rotation
from lilliput.target import Target
from lilliput.training import grids
from lilliput.verbs.train import Train
from lilliput.verbs.trained import Trained

ROWS, WIDTH = 16, 64
INT4, INT3 = IntegerFormat(4, True, 32), IntegerFormat(3, False, 32)
NF4 = from_target(Target(format="nf4", group_size=32))
CASES: list[tuple[str, Format, dict[str, Any]]] = [
    ("lsq", INT4, {}),
    ("lsq", INT3, {"zeros": True}),
    ("lsq", INT3, {"start": "original"}),
    ("lsq", INT3, {"start": "within"}),
    ("lsq", INT4, {"grid": "kept"}),
    ("lsq", NF4, {}),
    ("lsq", TernaryFormat(32), {}),
    ("lsq", TernaryFormat(32), {"grid": "anew", "start": "original"}),
    ("lsq", INT3, {"grid": "anew", "start": "original"}),
    ("lsq", BinaryFormat(2, 32), {}),
    ("peqa", INT3, {}),
    ("peqa", NF4, {}),
    ("alphatuning", BinaryFormat(3, 32), {}),
    ("alphatuning", BinaryFormat(3, 32), {"alphas": "all"}),
    ("onebit", SignFormat(), {}),
    ("onebit", SignFormat(), {"start": "original"}),
    ("l4q", INT3, {"start": "original"}),
    ("l4q", NF4, {"alpha": 8.0}),
    ("lr-qat", INT4, {"hold": "q4.4", "start": "original"}),
    ("lr-qat", INT3, {"inner": 4}),
]
IDS = [f"{name}-{form.describe()}-{o}" for name, form, o in CASES]


def _weight() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.1


def _layer(form: Format, around: bool, parts: tuple[Part, ...] = ()) -> Layer:
    w = _weight()
    grid = form.fit(w)
    part = QuantizedPart(form, form.encode(w, grid), grid)
    turned = (Rotation("hadamard", 1),) if around else ()
    return Layer("a", part.decode(), (*parts[:1], part, *parts[1:]), inputs=turned, outputs=turned)


def _product(seed: int) -> Part:
    g = torch.Generator().manual_seed(seed)
    return plain_factors(torch.randn(ROWS, 2, generator=g) * 0.05, torch.randn(2, WIDTH, generator=g) * 0.05)


def _begin(name: str, layer: Layer, options: Mapping[str, Any], original: Tensor | None = None) -> Trained:
    method = get(name)
    spec = method.spec
    assert isinstance(spec, Train)
    assert spec.admits(schemes.of(layer), method.parse(options)) is None
    return spec.begin(layer, _weight() if original is None else original, method.parse(options))


def _descend(core: Trained, steps: int = 30, lr: float = 2e-3) -> list[float]:
    """Towards a larger weight, as it maps some inputs."""
    x = torch.randn(WIDTH, 40, generator=torch.Generator().manual_seed(3))
    rates = core.rates()
    optimizer = torch.optim.Adam([{"params": [p], "lr": lr * rates.get(n, 1.0)} for n, p in core.named_parameters()])
    out = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((core.weight() - 1.3 * _weight()) @ x).square().mean()
        loss.backward()
        optimizer.step()
        out.append(float(loss.detach()))
    return out


@pytest.mark.parametrize("around", [False, True], ids=["alone", "between-others"])
@pytest.mark.parametrize(("name", "form", "options"), CASES, ids=IDS)
def test_what_was_trained_is_what_is_stored(name: str, form: Format, options: dict[str, Any], around: bool) -> None:
    layer = _layer(form, around, (_product(1), _product(2)) if around else ())
    core = _begin(name, layer, options)
    _descend(core, 5)
    done = core.finish()
    assert torch.equal(core.weight(), done.decode())
    assert schemes.of(done) == schemes.of(layer)
    packed = schemes.of(layer).pack(done)
    assert {k: (x.dtype, tuple(x.shape)) for k, x in packed.items()} == schemes.of(layer).stored(ROWS, WIDTH)


@pytest.mark.parametrize(("name", "form", "options"), CASES, ids=IDS)
def test_the_loss_falls(name: str, form: Format, options: dict[str, Any]) -> None:
    losses = _descend(_begin(name, _layer(form, False), options), 60)
    assert min(losses[-10:]) < losses[0]


@pytest.mark.parametrize("form", [INT4, INT3, NF4, TernaryFormat(32)], ids=lambda x: x.describe())
def test_nothing_changes_before_the_first_step(form: Format) -> None:
    layer = _layer(form, False)
    for name in ("lsq", "peqa", "l4q", *(("lr-qat",) if isinstance(form, IntegerFormat) else ())):
        assert torch.equal(_begin(name, layer, {}).finish().decode(), layer.decode())


@pytest.mark.parametrize("form", [INT4, INT3, NF4, TernaryFormat(32), BinaryFormat(2, 32)], ids=lambda x: x.describe())
def test_within_begins_at_the_original_where_its_code_is_the_folders(form: Format) -> None:
    """The codes are those of other weights, as a method that compensates leaves them."""
    layer = replace(_layer(form, False), weight=torch.zeros(ROWS, WIDTH))
    original = _weight() + 0.05 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
    core = _begin("lsq", layer, {"start": "within"}, original)
    assert torch.equal(core.finish().decode(), layer.decode())
    held, latent = layer.decode(), core.get_parameter("latent").detach()
    (part,) = layer.parts
    assert isinstance(part, QuantizedPart)

    def says(x: Tensor) -> Tensor:
        """Where weights have the folder's codes, inside the window."""
        same = replace(part, codes=form.encode(x, part.grid)).decode() == held
        return same & grids.of(form, part.grid, WIDTH).passed(x, part.grid).bool()

    theirs = says(original)
    assert 0 < int(theirs.sum()) < theirs.numel()
    assert torch.equal(latent[theirs], original[theirs])
    way = latent - held
    assert bool(says(held + 1.9 * way)[~theirs].all())
    assert not bool(says(held + 2.2 * way + 0.05 * (original - held))[~theirs].any())


def test_peqa_keeps_every_code() -> None:
    layer = _layer(INT3, False)
    core = _begin("peqa", layer, {})
    _descend(core)
    (before,), (after,) = layer.parts, core.finish().parts
    assert torch.equal(before.pack()[""], after.pack()[""])
    assert torch.equal(before.pack()["_zero"], after.pack()["_zero"])
    assert not torch.equal(before.pack()["_scale"], after.pack()["_scale"])
    assert sum(p.numel() for p in core.parameters()) == ROWS * WIDTH // 32


def test_alphatuning_moves_the_largest_alpha_alone() -> None:
    layer = _layer(BinaryFormat(3, 32), False)
    core = _begin("alphatuning", layer, {})
    _descend(core)
    (before,), (after,) = layer.parts, core.finish().parts
    assert isinstance(before, QuantizedPart)
    assert isinstance(after, QuantizedPart)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.grid.offset, after.grid.offset)
    moved = before.grid.alpha != after.grid.alpha
    assert bool(moved.any())
    assert not bool((moved.sum(-1) > 1).any())
    largest = before.grid.alpha.abs() == before.grid.alpha.abs().amax(-1, keepdim=True)
    assert bool(largest[moved].all())


def test_lr_qat_holds_weights_to_a_sixteenth_of_a_code() -> None:
    layer, w = _layer(INT4, False), _weight()
    scale = INT4.opened(layer.parts[0].grid)[0].repeat_interleave(32, 1)  # type: ignore[attr-defined]
    ours = {}
    for hold in ("bfloat16", "q4.4"):
        core = _begin("lr-qat", layer, {"start": "original", "hold": hold})
        held = core.get_buffer("held").float() / (16 if hold == "q4.4" else 1)
        exact = (w / scale).clamp(-8, 127 / 16)
        assert float((held.clamp(-8, 127 / 16) - exact).abs().max()) <= 2**-5
        ours[hold] = core.weight()
    near = (ours["bfloat16"] - ours["q4.4"]).abs() / scale
    assert bool((near.round() <= 1).all())
    assert float((near > 0.5).float().mean()) < 0.1  # those next to an edge between two codes


def test_lr_qat_computes_its_rounding_in_float64_alike() -> None:
    core = _begin("lr-qat", _layer(INT3, False), {"inner": 4, "alpha": 2.0, "start": "original"})
    _descend(core, 8)
    names = dict(core.named_parameters())
    left, right = names["factors.left"].detach().double(), names["factors.right"].detach().double()
    at = core.get_buffer("held").double() + 0.5 * left @ right
    (part,) = core.finish().parts
    scale, zero = (x.double().repeat_interleave(32, 1) for x in INT3.opened(part.grid))  # type: ignore[attr-defined]
    expected = scale * ((at - zero).round() + zero).clamp(INT3.lowest, INT3.highest).sub(zero)
    off = (expected - core.weight().double()).abs() > 1e-6
    assert float(off.double().mean()) < 0.005  # float32 decides otherwise between two codes alone


def test_l4q_with_no_product_is_lsq() -> None:
    layer = _layer(INT3, False)
    ours, theirs = (_begin(x, layer, {"start": "original", "zeros": True}) for x in ("l4q", "lsq"))
    assert torch.equal(ours.weight(), theirs.weight())
    g = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
    for core in (ours, theirs):
        (core.weight() * g).sum().backward()
    mine, lsq = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert torch.equal(mine["scale"].grad, lsq["scale"].grad)
    assert torch.equal(mine["zero"].grad, lsq["zero"].grad)
    by_left = lsq["latent"].grad @ mine["factors.right"].detach().T
    assert torch.allclose(mine["factors.left"].grad, by_left, atol=1e-5)


def test_int2_1_trains_the_product_alone() -> None:
    layer = _layer(INT3, True, (_product(1), _product(2)))
    core = _begin("int2-1", layer, {})
    assert torch.equal(core.weight(), layer.decode())
    losses = _descend(core)
    assert losses[-1] < losses[0]
    done = core.finish()
    assert torch.equal(core.weight(), done.decode())
    for n, same in enumerate((True, True, False)):
        old, new = layer.parts[n].pack(), done.parts[n].pack()
        assert all(torch.equal(old[k], new[k]) for k in old) == same


@pytest.mark.parametrize("name", ["lsq", "l4q", "lr-qat"])
def test_what_is_pruned_stays_zero(name: str) -> None:
    w = _weight()
    support = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(4)) > 0.5
    pruned = w * support
    for form in (INT4, INT3):
        grid = form.fit(pruned)
        layer = Layer("a", pruned, (QuantizedPart(form, form.encode(pruned, grid), grid),))
        for told, options in ((Layer("a", pruned, layer.parts, support), {}), (layer, {"keep_zeros": True})):
            core = _begin(name, told, {"start": "original", **options})
            _descend(core, 10, 1e-2)
            assert not bool(core.finish().decode()[~support].any())


@pytest.mark.parametrize(
    ("name", "form", "options", "words"),
    [
        ("lsq", None, {}, "plain linear"),
        ("lsq", SignFormat(), {}, "stored as sign"),
        ("lsq", INT4, {"zeros": True}, "no zero points"),
        ("lsq", NF4, {"grid": "anew"}, "integers and ternary"),
        ("lsq", INT3, {"grid": "kept", "zeros": True}, "leave out `zeros`"),
        ("lsq", BinaryFormat(2, 32), {"keep_zeros": True}, "no code that says 0"),
        ("peqa", BinaryFormat(2, 32), {}, "codes of integers"),
        ("alphatuning", INT4, {}, "binary coding"),
        ("onebit", INT4, {}, "codes of signs"),
        ("lr-qat", NF4, {}, "codes of integers"),
        ("lr-qat", IntegerFormat(8, True, 32), {"hold": "q4.4"}, "q4.4 holds"),
        ("int2-1", INT4, {}, "without a product"),
    ],
)
def test_other_linears_are_refused(name: str, form: Format | None, options: dict[str, Any], words: str) -> None:
    method = get(name)
    assert isinstance(method.spec, Train)
    reason = method.spec.admits(schemes.quantized(form), method.parse(options))
    assert reason is not None
    assert words in reason
