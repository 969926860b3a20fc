"""Training steps that move zeros, against loops in float64, and the number of zeros that they end with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import api
from lilliput.errors import PlanError
from lilliput.methods import get
from lilliput.model.stored import open_model
from lilliput.parts.layer import Layer
from lilliput.progress import Quiet
from lilliput.training.sparse import Sparse, cubic
from lilliput.verbs.train import Train

Tiny = Callable[[str], Path]
ROWS, WIDTH, STEPS = 6, 8, 20
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("gmp", {}),
    ("gmp", {"through": True, "regrow": 1e-3, "sparse_from": 1.0}),
    ("gmp", {"penalty": "rpp", "strength": 0.1}),
    ("movement", {}),
    ("movement", {"kind": "soft"}),
    ("movement", {"kind": "pst", "products": 2}),
    ("platon", {}),
    ("lottery-ticket", {}),
    ("loraprune", {}),
]
NAMES = [f"{name}-{'-'.join(map(str, o.values()))}" for name, o in METHODS]
RUN: dict[str, Any] = {
    "samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0, "progress": Quiet(),
}  # fmt: skip


def _begin(name: str, options: Mapping[str, Any], sparsity: float = 0.5, pattern: str | None = None) -> Sparse:
    torch.manual_seed(3)
    original = torch.randn(ROWS, WIDTH)
    score = original.abs()
    if pattern is None:
        keep = original.numel() - round(sparsity * original.numel())
        mask = score >= score.flatten().sort(descending=True).values[keep - 1]
    else:
        mask = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
        mask.view(-1, 4).scatter_(1, score.view(-1, 4).topk(2, 1).indices, True)
    spec = get(name).spec
    assert isinstance(spec, Train)
    options = {"steps": STEPS, "every": 2, "until": 0.5, **options}
    core = spec.begin(Layer("a", original * mask), original.clone(), get(name).parse(options))
    assert isinstance(core, Sparse)
    core.planned(int(mask.sum()), pattern)
    return core


def _start(core: Sparse) -> Tensor:
    """The weights before any step."""
    return core.get_parameter("value").detach().clone()


def _trained(core: Sparse, steps: int = STEPS, lr: float = 0.05, watch: Callable[[int], None] | None = None) -> None:
    """Plain gradient descent, at the rates of the method, on a quadratic loss of the weight."""
    torch.manual_seed(5)
    x, y = torch.randn(16, WIDTH), torch.randn(16, ROWS)
    leaves = [(p, core.rates().get(n, 1.0)) for n, p in core.named_parameters() if p.requires_grad]
    for step in range(steps):
        core.step(step / STEPS)
        for p, _ in leaves:
            p.grad = None
        loss = (x @ core.weight().T - y).square().mean()
        penalty = core.penalty()
        (loss if penalty is None else loss + penalty).backward()
        core.after_backward()
        with torch.no_grad():
            for p, factor in leaves:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=lr * min(factor, 1.0))
        core.after_step(lr)
        if watch is not None:
            watch(step)


def _slope(weight: Tensor) -> Tensor:
    """The gradient of that loss by the weight, float64."""
    torch.manual_seed(5)
    x, y = torch.randn(16, WIDTH).double(), torch.randn(16, ROWS).double()
    return 2 * (x @ weight.T - y).T @ x / y.numel()


@pytest.mark.parametrize(("name", "options"), METHODS, ids=NAMES)
@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("steps", [STEPS, 3])
def test_every_step_ends_with_as_many_zeros_as_planned(
    name: str, options: dict[str, Any], pattern: str | None, steps: int
) -> None:
    """Also where it ended early; what it leaves is what it computed."""
    core = _begin(name, options, pattern=pattern)
    _trained(core, steps)
    layer = core.finish()
    assert layer.support is not None
    assert int(layer.support.sum()) == ROWS * WIDTH // 2
    assert torch.equal(layer.decode(), core.weight().detach())
    assert not bool((layer.decode() * ~layer.support).any())
    if pattern is not None:
        assert set(layer.support.view(-1, 4).sum(1).tolist()) == {2}


def test_the_cubic_schedule_at_its_ends_and_between() -> None:
    assert cubic(0.1, 0.7, 0.0) == pytest.approx(0.1)
    assert cubic(0.1, 0.7, 1.0) == 0.7
    assert cubic(0.0, 0.8, 0.5) == pytest.approx(0.8 * (1 - 0.5**3))


def test_gradual_pruning_is_the_loop_of_its_equations() -> None:
    core = _begin("gmp", {})
    value, mask = _start(core).double(), torch.ones(ROWS, WIDTH, dtype=torch.bool)
    _trained(core)
    for step in range(STEPS):
        if step % 2 == 0 and step <= STEPS // 2:
            zeros = 0.5 + (0.0 - 0.5) * (1 - min(step / STEPS / 0.5, 1.0)) ** 3
            keep = max(24, 48 - round(zeros * 48))
            mask = value.abs() >= value.abs().flatten().sort(descending=True).values[keep - 1]
        value = value - 0.05 * _slope(value * mask) * mask
    assert torch.equal(core.mask, mask)
    torch.testing.assert_close(core.finish().decode().double(), value * mask, rtol=1e-5, atol=1e-6)


def test_movement_collects_minus_weight_times_gradient() -> None:
    core = _begin("movement", {"score_rate": 1.0})
    value, score = _start(core).double(), torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    _trained(core)
    for step in range(STEPS):
        if step % 2 == 0 and 0 < step <= STEPS // 2:
            zeros = 0.5 - 0.5 * (1 - min(step / STEPS / 0.5, 1.0)) ** 3
            keep = max(24, 48 - round(zeros * 48))
            mask = score >= score.flatten().sort(descending=True).values[keep - 1]
        slope = _slope(value * mask)
        score, value = score - 0.05 * slope * value, value - 0.05 * slope * mask
    assert torch.equal(core.mask, mask)
    torch.testing.assert_close(core.scores().detach().double(), score, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(core.finish().decode().double(), value * mask, rtol=1e-4, atol=1e-6)


def test_frozen_weights_stay_and_only_their_places_are_trained() -> None:
    core = _begin("movement", {"frozen": True})
    before = _start(core)
    _trained(core)
    assert torch.equal(core.finish().decode(), before * core.mask)


def test_the_soft_mask_is_a_threshold_and_its_penalty_grows() -> None:
    core = _begin("movement", {"kind": "soft", "tau": 0.6, "strength": 2.0})
    core.step(0.0)
    assert int(core.mask.sum()) == 0  # sigmoid(0) is below the threshold
    core.step(0.25)
    penalty = core.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(2.0 * 0.5 * 0.5, rel=1e-6)
    core.step(0.5)
    assert core.penalty() is None
    assert int(core.mask.sum()) == 24


def test_platon_is_sensitivity_times_uncertainty() -> None:
    core = _begin("platon", {"every": 1, "smoothing": 0.85, "doubt": 0.95})
    value = _start(core).double()
    seen = doubt = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    _trained(core)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    for step in range(STEPS):
        slope = _slope(value)
        now = (value * slope).abs()
        seen = 0.85 * seen + 0.15 * now
        doubt = 0.95 * doubt + 0.05 * (now - seen).abs()
        score = seen * doubt
        zeros = 0.5 - 0.5 * (1 - min((step + 1) / STEPS / 0.5, 1.0)) ** 3
        keep = max(24, 48 - round(zeros * 48))
        mask = score >= score.flatten().sort(descending=True).values[keep - 1]
        value = (value - 0.05 * slope) * mask
    assert torch.equal(core.mask, mask)
    torch.testing.assert_close(core.finish().decode().double(), value, rtol=1e-4, atol=1e-6)


def test_a_ticket_goes_back_to_where_it_began_in_every_round() -> None:
    core = _begin("lottery-ticket", {"rounds": 2, "until": 0.8})
    before, kept, values = _start(core), [], []

    def watch(step: int) -> None:
        kept.append(int(core.mask.sum()))

    _trained(core, watch=watch)
    assert kept[7] == 48
    assert kept[8] == round(48 * 0.5**0.5)
    assert kept[16] == 24
    # A round of no steps leaves the winners at the original's values.
    again = _begin("lottery-ticket", {"rounds": 2, "until": 0.8})
    _trained(again, 16)
    again.step(16 / STEPS)
    values = again.finish().decode()
    assert torch.equal(values, before * again.mask)


def test_a_gradient_estimated_from_factors_is_that_of_their_product_to_first_order() -> None:
    core = _begin("loraprune", {"width": 3})
    torch.manual_seed(1)
    with torch.no_grad():
        for p in core.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    up, down = (getattr(core, x).detach().double() for x in ("up", "down"))
    core.step(0.0)
    core.weight().square().mean().backward()
    before = core.scores().clone()
    core.after_backward()
    a, b = (getattr(core, x).grad.double() for x in ("up", "down"))
    estimate = a @ down + up @ b - a @ b
    whole = (up @ down).double() + core.frozen.double()  # type: ignore[operator]
    smooth = core.settings.smoothing  # type: ignore[attr-defined]
    expected = smooth * before.double() + (1 - smooth) * (whole * estimate).square()
    torch.testing.assert_close(core.scores().double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), METHODS, ids=NAMES)
def test_what_is_not_a_parameter_is_named_so_that_a_resumed_run_goes_on_alike(
    name: str, options: dict[str, Any]
) -> None:
    whole, first, second = (_begin(name, options) for _ in range(3))
    _trained(whole, 16)
    _trained(first, 7)
    with torch.no_grad():
        own = dict(second.named_parameters())
        for key, value in first.named_parameters():
            own[key].copy_(value)
        for key, value in first.state().items():
            second.state()[key].copy_(value)
    torch.manual_seed(5)
    x, y = torch.randn(16, WIDTH), torch.randn(16, ROWS)
    leaves = [(p, second.rates().get(n, 1.0)) for n, p in second.named_parameters() if p.requires_grad]
    for step in range(7, 16):
        second.step(step / STEPS)
        for p, _ in leaves:
            p.grad = None
        penalty = second.penalty()
        loss = (x @ second.weight().T - y).square().mean()
        (loss if penalty is None else loss + penalty).backward()
        second.after_backward()
        with torch.no_grad():
            for p, factor in leaves:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.05 * min(factor, 1.0))
        second.after_step(0.05)
    assert torch.equal(whole.finish().decode(), second.finish().decode())


@pytest.mark.parametrize("export", ["", "export: lilliput\n"])
@pytest.mark.parametrize("target", ["sparsity: 0.75", 'pattern: "2:4"'])
def test_a_folder_has_the_planned_bytes_and_can_be_trained_again(
    tiny: Tiny, tmp_path: Path, target: str, export: str
) -> None:
    step = "{method: METHOD, options: {steps: 4, lr: 0.01, tokens: 32, every: 1, until: 0.5, start: START}}"
    recipe = f"{export}steps:\n  - {{method: magnitude, target: {{{target}}}}}\n  - "
    first = api.compress(
        tiny("qwen2"), tmp_path / "a", recipe=recipe + step.replace("METHOD", "gmp").replace("START", "original"), **RUN
    )
    assert first.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "a").glob("*.safetensors"))
    again = "steps:\n  - " + step.replace("METHOD", "gmp").replace("START", "pruned").replace("0.01", "0.05")
    api.compress(tmp_path / "a", tmp_path / "b", recipe=again, teacher=tiny("qwen2"), **RUN)
    share = 0.25 if "sparsity" in target else 0.5
    before, after = (open_model(tmp_path / x) for x in "ab")
    moved = 0
    for name in before.refs:
        if name.endswith("proj.weight"):
            a, b = before.read(name) != 0, after.read(name) != 0
            assert int(a.sum()) == int(b.sum()) == round(share * a.numel())
            moved += int((a != b).sum())
    assert moved


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("  - {method: gptq, target: {bits: 4, group_size: 32}}\n  - {method: gmp}\n", "says how many there are"),
        ("  - {method: magnitude}\n  - {method: rtn, target: {bits: 4, group_size: 32}}\n  - {method: gmp}\n", "plain"),
        ("  - {method: magnitude}\n  - {method: full}\n  - {method: gmp}\n", "set its option `start` to pruned"),
        ("  - {method: flap}\n  - {method: magnitude}\n  - {method: platon}\n", "set its option `start` to pruned"),
        ("  - {method: magnitude}\n  - {method: gmp, options: {begin: 0.9}}\n", "begin comes before until"),
    ],
)
def test_what_contradicts_is_refused_by_the_plan(tiny: Tiny, steps: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        api.plan(tiny("qwen2"), recipe="steps:\n" + steps, samples=2, tokens=32)


def test_blocks_stay_or_leave_together_by_their_mean_score() -> None:
    core = _begin("movement", {"block": [2, 4]})
    core.count = 24
    _trained(core)
    blocks = core.mask.view(3, 2, 2, 4).permute(0, 2, 1, 3).reshape(6, 8)
    assert sorted(blocks.sum(1).tolist()) == [0, 0, 0, 8, 8, 8]
    core.mask.copy_(core.chosen(1.0))
    means = core.scores().detach().view(3, 2, 2, 4).mean((1, 3))
    stays = core.mask.view(3, 2, 2, 4)[:, 0, :, 0]
    assert float(means[stays].min()) >= float(means[~stays].max())


LOW = (
    "export: lilliput\nsteps:\n  - {method: magnitude, target: {sparsity: 0.75}, options: {block: [8, 1]}}\n"
    "  - {method: eora, target: {rank: 4}, options: {factors: float16}}\n"
    "  - {method: losparse, options: {steps: 4, lr: 0.01, tokens: 32, until: 0.5, block: [8, 1]}}\n"
)


def test_a_product_and_a_sparse_rest_are_trained_together(tiny: Tiny, tmp_path: Path) -> None:
    done = api.compress(tiny("qwen2"), tmp_path / "a", recipe=LOW, **RUN)
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "a").glob("*.safetensors"))
    untrained = "\n".join(LOW.splitlines()[:-1]) + "\n"
    api.compress(tiny("qwen2"), tmp_path / "b", recipe=untrained, **RUN)
    a, b = (open_model(tmp_path / x) for x in "ab")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(a.read(name), b.read(name))


def test_low_rank_and_sparse_begins_at_the_original_and_ends_with_what_it_computed() -> None:
    from lilliput.parts.bitmask import gather
    from lilliput.parts.lowrank import plain_factors

    torch.manual_seed(0)
    w = torch.randn(8, 16)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, ::2] = True
    sparse, product = gather(w * mask, mask, torch.float32), plain_factors(torch.randn(8, 2), torch.randn(2, 16))
    spec = get("losparse").spec
    assert isinstance(spec, Train)
    layer = Layer("a", sparse.decode() + product.decode(), parts=(sparse, product))
    core = spec.begin(layer, w.clone(), get("losparse").parse({"steps": STEPS, "until": 0.5, "block": [8, 1]}))
    torch.testing.assert_close(core.weight(), w)
    for step in range(4):
        core.step(step / STEPS)
        core.zero_grad()
        core.weight().square().sum().backward()  # type: ignore[no-untyped-call]
        core.after_backward()
        with torch.no_grad():
            for p in core.parameters():
                p.sub_(p.grad, alpha=0.01)
        core.after_step(0.01)
    layer = core.finish()
    torch.testing.assert_close(layer.decode(), core.weight().detach())
    zeros = layer.parts[0].decode() == 0
    assert int((~zeros).sum()) == 64
    assert set(zeros.sum(0).tolist()) == {0, 8}  # whole columns


@pytest.mark.parametrize("width", [0, 4])
def test_few_parameters_keep_the_zeros_and_the_rest_of_a_linear(width: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 8) * (torch.rand(6, 8) > 0.5)
    spec = get("perp").spec
    assert isinstance(spec, Train)
    core = spec.begin(Layer("a", w), w, get("perp").parse({"width": width}))
    assert torch.equal(core.weight(), w)
    with torch.no_grad():
        for p in core.parameters():
            p.normal_()
    layer = core.finish()
    assert torch.equal(layer.decode(), core.weight())
    assert torch.equal(layer.decode() == 0, w == 0)
    product = layer.decode() - w
    expected = torch.zeros_like(w)
    if width:
        up, down = core.get_parameter("up").detach(), core.get_parameter("down").detach()
        for n, row in enumerate(w):
            for m, value in enumerate(row):
                if value:
                    expected[n, m] = 16.0 / width * float(up[n] @ down[:, m])
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
