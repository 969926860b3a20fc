"""What every method that compresses one linear owes its callers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import methods
from lilliput.errors import LilliputError
from lilliput.methods import index as catalogue
from lilliput.parts import scheme
from lilliput.parts.layer import Layer, split, stack
from lilliput.parts.linear import LinearSpec, decode
from lilliput.parts.quantized import QuantizedPart
from lilliput.parts.scheme import Scheme
from lilliput.stats.site import SiteStats
from lilliput.target import Target

COMPRESS = sorted(n for n, m in methods.discover().items() if m.spec.verb == "compress")
QUANTIZE = [n for n in COMPRESS if methods.get(n).spec.writes == "quantized"]
INTEGERS = [n for n in QUANTIZE if "int" in (methods.get(n).spec.formats or ()) and methods.get(n).spec.scheme is None]
REFINE = [n for n in COMPRESS if getattr(methods.get(n).spec, "refines", False)]
PRUNE = [n for n in COMPRESS if methods.get(n).spec.writes == "support" and n not in REFINE]


def _default(method: str) -> dict[str, Any]:
    """The method's own step: what its default recipe asks for."""
    steps = catalogue.steps_of(method)
    return next(step for step in reversed(steps) if step["method"] == method)


def _target(method: str, **changes: Any) -> Target:
    """That of the method's own default recipe, in groups that fit the toy."""
    found = methods.get(method)
    if found.spec.writes == "support":
        return Target.model_validate({"sparsity": 0.5, **changes})
    own = {**_default(method).get("target", {}), **changes}
    needed = {"bits": 4} if found.spec.writes == "quantized" or "bits" in own else {}
    given = {**needed, **own}
    if given.get("group_size", "auto") == "auto":
        given["group_size"] = 16
    return found.spec.completed(Target.model_validate(given))


def _scheme(method: str, target: Target, rows: int, width: int) -> Scheme:
    found = methods.get(method)
    return found.scheme(target, found.parse(_default(method).get("options", {})), rows, width)


def _fills(method: str) -> bool:
    """Whether its parts reach everywhere, so that the plan refuses it after a mask."""
    scheme = _scheme(method, _target(method), 96, 48)
    return bool(scheme.inputs or scheme.outputs or scheme.fills or not methods.get(method).spec.masked)


def _layer(name: str, w: Tensor, **more: Any) -> Layer:
    fisher = torch.rand(w.shape, generator=torch.Generator().manual_seed(5)) ** 4 + 1e-8
    return Layer(name, w, fisher=fisher, **more)


def _pruned(method: str, layer: Layer) -> Layer:
    """The layer as a method may see it: with zeros for one that refines them."""
    if method not in REFINE:
        return layer
    lost = torch.rand(layer.weight.shape[1], generator=torch.Generator().manual_seed(6)) < 0.5
    return layer.with_support((~lost).expand_as(layer.weight).contiguous())


def _run(method: str, layer: Layer, stats: SiteStats, target: Target, **options: Any) -> Layer:
    found = methods.get(method)
    given = {**_default(method).get("options", {}), **options}
    out = found.spec.run(layer, stats, target, found.parse(given))
    assert isinstance(out, Layer)
    return out


def _loss(w: Tensor, out: Layer, stats: SiteStats) -> float:
    d = (w - out.decode()).double()
    return float(((d @ stats.need("gram").double()) * d).sum())


def _copy(stats: SiteStats) -> SiteStats:
    return stats.scaled(torch.ones(stats.width))


@pytest.mark.parametrize("name", COMPRESS)
def test_inputs_are_left_alone_and_results_repeat(name: str, toy: Any) -> None:
    w, stats = toy.tensors["down"], toy.io().stats["down"]
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    held = {} if _fills(name) else {"support": mask}
    layer, kept = _layer("down", w, **held), (w.clone(), mask.clone(), _copy(stats))
    first = _run(name, _pruned(name, layer), stats, _target(name))
    again = _run(name, _pruned(name, _layer("down", w.clone(), **held)), kept[2], _target(name))
    assert torch.equal(w, kept[0])
    assert torch.equal(mask, kept[1])
    for field in ("gram", "square", "mean", "absmax", "absmean"):
        assert torch.equal(stats.need(field), kept[2].need(field))
    assert torch.equal(first.decode(), again.decode())
    assert first.weight is w


@pytest.mark.parametrize("name", [n for n in COMPRESS if not methods.get(n).spec.masked])
def test_what_would_fill_zeros_refuses_a_pruned_layer(name: str, toy: Any) -> None:
    layer = Layer("up", toy.tensors["up"], support=toy.tensors["up"] > 0)
    with pytest.raises(LilliputError, match="up is pruned"):
        _run(name, layer, toy.io().stats["up"], _target(name))


@pytest.mark.parametrize("name", [n for n in COMPRESS if not _fills(n)])
def test_nothing_is_written_outside_the_support(name: str, toy: Any) -> None:
    w, stats = toy.tensors["up"], toy.io().stats["up"]
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    for symmetric in (True, False):
        out = _run(name, _layer("up", w, support=mask), stats, _target(name, symmetric=symmetric))
        assert out.support is not None
        assert bool((out.decode()[~out.support] == 0).all())
        if name in REFINE:  # zeros may move, but there are no fewer
            assert int(out.support.sum()) <= int(mask.sum())
            continue
        assert bool((out.support <= mask).all())


@pytest.mark.parametrize("name", [n for n in COMPRESS if _scheme(n, _target(n), 96, 48).parts])
@pytest.mark.parametrize("linear", ["up", "down", "k"])
def test_what_the_plan_counted_is_what_is_stored(name: str, linear: str, toy: Any) -> None:
    w, stats = toy.tensors[linear], toy.io().stats[toy.block.linear(linear).site]
    target = _target(name)
    if target.rank is not None:
        target = target.model_copy(update={"rank": min(target.rank, *w.shape)})
    out, planned = _run(name, _layer(linear, w), stats, target), _scheme(name, target, *w.shape)
    assert scheme.of(out) == planned
    tensors, described = planned.pack(out), planned.stored(*w.shape)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == described
    bits = 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    size = planned.size_bits(*w.shape)
    around = 8 * sum(t.numel() * t.element_size() for n, t in tensors.items() if n.startswith(("_in", "_out")))
    assert size == around + sum(part.bits() for part in out.parts)
    # Every stored tensor, or every row of it, ends on a byte.
    assert size <= bits <= size + 8 * len(tensors) * sum(w.shape)
    spec = LinearSpec(linear, linear, *w.shape, scheme.from_plain(planned.plain()))
    read = decode(spec, {f"{linear}.weight{n}": t for n, t in tensors.items()}.__getitem__)
    assert torch.allclose(read, out.decode(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("group", [16, 20, "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_declared_bits_are_exact(name: str, group: int | str, symmetric: bool, toy: Any) -> None:
    w, stats = toy.tensors["up"], toy.io().stats["up"]
    for bits in (2, 3, 8):
        out = _run(
            name, _layer("up", w), stats, _target(name, format="int", bits=bits, group_size=group, symmetric=symmetric)
        )
        (part,) = out.parts
        assert isinstance(part, QuantizedPart)
        assert (part.format.bits, part.format.symmetric) == (bits, symmetric)
        assert part.codes.dtype == torch.int8
        assert int(part.codes.min()) >= -(2 ** (bits - 1))
        assert int(part.codes.max()) < 2 ** (bits - 1)
        assert (part.grid.zero is None) == symmetric
        assert part.grid.scale.dtype == torch.float16
        per_unit = 16 + (0 if symmetric else bits)
        assert part.bits() == w.numel() * bits + part.grid.scale.numel() * per_unit


@pytest.mark.parametrize("name", INTEGERS)
def test_enough_bits_change_almost_nothing(name: str, toy: Any) -> None:
    w, stats = toy.tensors["up"], toy.io().stats["up"]
    out = _run(name, _layer("up", w), stats, _target(name, bits=8))
    assert _loss(w, out, stats) < 1e-4 * _loss(w, Layer("up", torch.zeros_like(w)), stats)


@pytest.mark.parametrize("name", REFINE)
def test_what_refines_zeros_needs_some(name: str, toy: Any) -> None:
    with pytest.raises(LilliputError, match="up is not pruned"):
        _run(name, _layer("up", toy.tensors["up"]), toy.io().stats["up"], _target(name))


@pytest.mark.parametrize("name", PRUNE)
def test_sparsity_nought_and_one(name: str, toy: Any) -> None:
    w, stats = toy.tensors["up"], toy.io().stats["up"]
    assert torch.equal(_run(name, _layer("up", w), stats, Target(sparsity=0.0)).decode(), w)
    assert not bool(_run(name, _layer("up", w), stats, Target(sparsity=1.0)).decode().any())
    assert torch.equal(_run(name, _layer("up", w), stats, Target(pattern="4:4")).decode(), w)


@pytest.mark.parametrize("name", PRUNE)
def test_kept_counts_are_exact_even_among_equals(name: str, toy: Any) -> None:
    stats = toy.io().stats["up"]
    for w in (toy.tensors["up"], torch.ones(96, 48), torch.zeros(96, 48)):
        for sparsity in (0.3, 0.5, 0.77):
            out = _run(name, _layer("up", w), stats, Target(sparsity=sparsity))
            assert out.support is not None
            rows = {int(n) for n in out.support.sum(1)}
            if methods.get(name).parse({}).scope != "row":  # type: ignore[attr-defined]
                assert int(out.support.sum()) == w.numel() - round(sparsity * w.numel())
            else:
                assert rows == {48 - round(sparsity * 48)}
        out = _run(name, _layer("up", w), stats, Target(pattern="2:4"))
        assert out.support is not None
        assert bool((out.support.view(96, 12, 4).sum(2) == 2).all())


@pytest.mark.parametrize("name", [n for n in COMPRESS if methods.get(n).spec.baseline])
def test_beats_its_baseline_on_correlated_inputs(name: str, toy: Any) -> None:
    baseline = methods.get(name).spec.baseline
    assert baseline is not None
    target = _target(name)
    pruning = {"sparsity": target.sparsity, "pattern": target.pattern}
    same = _target(baseline, **{"bits": target.bits, "group_size": target.group_size, **pruning})
    for linear in ("q", "up", "down"):
        w, stats = toy.tensors[linear], toy.io().stats[toy.block.linear(linear).site]
        ours = _loss(w, _run(name, _layer(linear, w), stats, target), stats)
        assert ours < _loss(w, _run(baseline, _layer(linear, w), stats, same), stats)


def _target_of_rows(name: str) -> Target | None:
    """A target for which linears of one site are stacked; None: there is none."""
    options = methods.get(name).parse(_default(name).get("options", {}))
    pattern = [Target(pattern="2:4")] if methods.get(name).spec.writes == "support" else []
    return next((t for t in (_target(name), *pattern) if methods.get(name).spec.stacks(t, options)), None)


@pytest.mark.parametrize("name", [n for n in COMPRESS if methods.get(n).spec.rowwise])
def test_stacked_rows_come_out_as_they_do_alone(name: str, toy: Any) -> None:
    """Within 1 % of the loss and 99.8 % of the values: sums may round differently for other shapes."""
    stats = toy.io().stats["q"]
    target = _target_of_rows(name)
    assert target is not None
    layers = [_pruned(name, _layer(n, toy.tensors[n])) for n in ("q", "k", "v")]
    whole = split(_run(name, stack(layers), stats, target), [(x.name, x.weight.shape[0]) for x in layers])
    for layer, part in zip(layers, whole, strict=True):
        alone = _run(name, layer, stats, target)
        assert float((alone.decode() == part.decode()).double().mean()) >= 0.998
        a, b = _loss(layer.weight, alone, stats), _loss(layer.weight, part, stats)
        assert abs(a - b) <= 0.01 * a


@pytest.mark.parametrize("name", [*INTEGERS, *PRUNE])
def test_a_target_that_asks_for_nothing_is_refused(name: str, toy: Any) -> None:
    with pytest.raises(Exception, match=r"target\.(bits|sparsity|ratio|rank)"):
        _run(name, _layer("up", toy.tensors["up"]), toy.io().stats["up"], Target(group_size=16))


def test_wanda_then_gptq_keeps_the_zeros_and_repairs_the_rest(toy: Any) -> None:
    w, stats = toy.tensors["down"], toy.io().stats["down"]
    pruned = _run("wanda", Layer("down", w), stats, Target(pattern="2:4"))
    out = _run("gptq", pruned, stats, _target("gptq", bits=8))
    assert pruned.support is not None
    assert bool((out.decode()[~pruned.support] == 0).all())
    # The sweep moves the pruned weights' error onto those that stay: better than the mask alone.
    assert _loss(w, out, stats) < 0.9 * _loss(w, pruned, stats)
