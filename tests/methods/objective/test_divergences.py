"""Objectives of single tokens against float64 loops over their equations, and what is known of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput import methods
from lilliput.algebra import divergences
from lilliput.errors import DataError, PlanError
from lilliput.methods.objective import cakld, tsld
from lilliput.target import Target
from lilliput.verbs.objective import Objective, Taught, TokenIO, events
from lilliput.verbs.spec import Task

N, V = 5, 7
FAMILY = [
    ("logit-kd", {}),
    ("divergence-kd", {"kind": "forward"}),
    ("divergence-kd", {"kind": "reverse"}),
    ("divergence-kd", {"kind": "jsd", "beta": 0.3}),
    ("divergence-kd", {"kind": "tv"}),
    ("cakld", {"gamma": 0.25}),
    ("tsld", {}),
    ("gkd", {"kind": "jsd"}),
]


def run(name: str, options: dict[str, Any], io: TokenIO) -> Tensor:
    method = methods.get(name)
    assert isinstance(method.spec, Objective)
    assert method.spec.tokens_loss is not None
    return method.spec.tokens_loss(io, method.parse(options))


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of teacher and student, and labels."""
    generator = torch.Generator().manual_seed(seed)
    z, v = (torch.randn(N, V, generator=generator) * 3 for _ in range(2))
    return z, v, torch.randint(0, V, (N,), generator=generator)


def whole(z: Tensor, v: Tensor, labels: Tensor, temperature: float = 1.0) -> TokenIO:
    return TokenIO(v, labels, Taught((z / temperature).log_softmax(-1)))


def kept(z: Tensor, k: int) -> Taught:
    log_p = z.log_softmax(-1)
    top, ids = log_p.topk(k, -1)
    return Taught(top, ids, log_p.scatter(1, ids, -torch.inf).logsumexp(1))


def probabilities(row: list[float]) -> list[float]:
    most = max(row)
    parts = [math.exp(x - most) for x in row]
    return [x / sum(parts) for x in parts]


def slow_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow(name: str, o: dict[str, Any], p: list[float], q: list[float]) -> float:
    if name in ("logit-kd", "tsld") or o.get("kind") == "forward":
        return slow_kl(p, q)
    if o.get("kind") == "reverse":
        return slow_kl(q, p)
    if o.get("kind") == "tv":
        return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    if name == "cakld":
        return float(o["gamma"] * slow_kl(q, p) + (1 - o["gamma"]) * slow_kl(p, q))
    beta = o.get("beta", 0.5)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return float(beta * slow_kl(p, m) + (1 - beta) * slow_kl(q, m))


@pytest.mark.parametrize(("name", "options"), FAMILY)
def test_a_loss_is_that_of_its_equation(name: str, options: dict[str, Any]) -> None:
    z, v, labels = drawn()
    found = run(name, options, whole(z, v, labels))
    expected = [
        slow(name, options, probabilities(a), probabilities(b))
        for a, b in zip(z.double().tolist(), v.double().tolist(), strict=True)
    ]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), FAMILY)
def test_a_loss_is_positive_and_zero_for_equal_models_alone(name: str, options: dict[str, Any]) -> None:
    z, v, labels = drawn(1)
    assert bool((run(name, options, whole(z, v, labels)) > 1e-3).all())
    same = z.clone().requires_grad_()
    zero = run(name, options, whole(z, same, labels))
    assert float(zero.detach().abs().max()) < 1e-6
    zero.sum().backward()  # type: ignore[no-untyped-call]
    if options.get("kind") != "tv":  # whose slope jumps there
        assert float(same.grad.abs().max()) < 1e-6  # type: ignore[union-attr]


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize(("name", "options"), FAMILY)
def test_losses_and_gradients_are_finite_for_any_logits(name: str, options: dict[str, Any], top: int | None) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 1e4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    for v in (z.flip(1), -z, z, torch.zeros_like(z)):
        logits = v.clone().requires_grad_()
        taught = Taught(z.log_softmax(-1)) if top is None else kept(z, top)
        loss = run(name, options, TokenIO(logits, torch.tensor([0, 1, 2]), taught))
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        assert bool(loss.isfinite().all())
        assert bool(logits.grad.isfinite().all())


def test_jsd_is_symmetric_bounded_and_goes_to_both_divergences() -> None:
    z, v, _ = drawn(2)
    log_p, log_q = z.double().log_softmax(-1), v.double().log_softmax(-1)
    half = divergences.jsd(log_p, log_q, 0.5)
    torch.testing.assert_close(half, divergences.jsd(log_q, log_p, 0.5))
    far = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert float(divergences.jsd(*(x.log_softmax(-1) for x in far), 0.5)) == pytest.approx(math.log(2))
    assert bool((half <= math.log(2)).all())
    tiny = 1e-7
    forward, reverse = divergences.kl(log_p, log_q), divergences.kl(log_q, log_p)
    torch.testing.assert_close(divergences.jsd(log_p, log_q, tiny) / tiny, forward, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(divergences.jsd(log_p, log_q, 1 - tiny) / tiny, reverse, rtol=1e-4, atol=1e-6)


def test_an_excluded_event_adds_nothing_and_has_no_gradient() -> None:
    log_a = torch.tensor([[0.0, -torch.inf]])
    log_b = torch.tensor([[math.log(0.25), -torch.inf]], requires_grad=True)
    found = divergences.kl(log_a, log_b)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert float(found.detach()) == pytest.approx(math.log(4))
    assert log_b.grad is not None
    assert log_b.grad.tolist() == [[-1.0, 0.0]]


def test_without_a_teacher_the_text_is_all() -> None:
    z, v, labels = drawn(3)
    expected = torch.nn.functional.cross_entropy(v, labels, reduction="none")
    for name in ("logit-kd", "divergence-kd"):
        torch.testing.assert_close(run(name, {"soft": 0.0}, whole(z, v, labels)), expected)
    torch.testing.assert_close(run("cross-entropy", {}, TokenIO(v, labels, None)), expected)
    smooth = torch.nn.functional.cross_entropy(v, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(run("cross-entropy", {"smoothing": 0.1}, TokenIO(v, labels, None)), smooth)


def test_temperature_and_the_form_of_the_survey() -> None:
    z, v, labels = drawn(4)
    io = whole(z, v, labels, 3.0)
    soft = [
        slow_kl(probabilities([x / 3 for x in a]), probabilities([x / 3 for x in b]))
        for a, b in zip(z.double().tolist(), v.double().tolist(), strict=True)
    ]
    kl = torch.tensor(soft)
    hard = torch.nn.functional.cross_entropy(v, labels, reduction="none")
    warm = torch.nn.functional.cross_entropy(v / 3, labels, reduction="none")
    usual = run("logit-kd", {"temperature": 3.0, "soft": 0.4}, io)
    torch.testing.assert_close(usual, 0.4 * 9 * kl + 0.6 * hard, rtol=1e-5, atol=1e-6)
    survey = run("logit-kd", {"temperature": 3.0, "soft": 0.4, "form": "survey"}, io)
    torch.testing.assert_close(survey, 0.4 * kl + 0.6 * warm, rtol=1e-5, atol=1e-6)


def test_a_hot_temperature_matches_logits() -> None:
    """T -> infinity: the gradient is that of 1 / (2 V) |(v - mean v) - (z - mean z)|^2."""
    z, v, labels = (x.double() if x.is_floating_point() else x for x in drawn(5))
    logits = v.clone().requires_grad_()
    run("logit-kd", {"temperature": 1e4}, whole(z, logits, labels, 1e4)).sum().backward()  # type: ignore[no-untyped-call]
    expected = ((v - v.mean(1, keepdim=True)) - (z - z.mean(1, keepdim=True))) / V
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd", "tv"])
def test_a_grey_box_of_all_tokens_is_white(kind: str) -> None:
    z, v, labels = drawn(6)
    log_p, ids = z.log_softmax(-1).topk(V, -1)
    expected = run("divergence-kd", {"kind": kind}, whole(z, v, labels))
    for rest in ("bucket", "renormalised"):
        found = run("divergence-kd", {"kind": kind, "rest": rest}, TokenIO(v, labels, Taught(log_p, ids)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_grey_box_has_one_event_for_the_rest_or_none() -> None:
    z, v, _ = drawn(7)
    for rest in ("bucket", "renormalised"):
        for log in events(v, kept(z, 3), rest=rest):  # type: ignore[arg-type]
            assert log.shape[1] == (4 if rest == "bucket" else 3)
            torch.testing.assert_close(log.exp().sum(1), torch.ones(N))
    q = v.softmax(-1)
    log_p, log_q = events(v, kept(z, 3))
    named = kept(z, 3).ids
    assert named is not None
    torch.testing.assert_close(log_q[:, 3].exp(), 1 - q.gather(1, named).sum(1), rtol=1e-4, atol=1e-6)
    # A coarser view of two distributions tells them apart no better.
    fine = divergences.kl(z.log_softmax(-1), v.log_softmax(-1))
    assert bool((divergences.kl(log_p, log_q) <= fine + 1e-6).all())


def test_cakld_is_forward_or_reverse_at_its_ends() -> None:
    io = whole(*drawn(8))
    for gamma, kind in ((0.0, "forward"), (1.0, "reverse")):
        torch.testing.assert_close(run("cakld", {"gamma": gamma}, io), run("divergence-kd", {"kind": kind}, io))


def test_cakld_takes_its_share_from_the_text() -> None:
    probabilities_of_text = [[0.5, 0.25], [0.75]]
    taught = [Taught(torch.zeros(len(x), 1), log_label=torch.tensor(x).log()) for x in probabilities_of_text]
    assert cakld.prepare(taught, cakld.Options()).gamma == pytest.approx(0.5)
    assert cakld.prepare(taught, cakld.Options(gamma=0.1)).gamma == 0.1
    with pytest.raises(DataError, match="longer answers"):
        cakld.prepare([], cakld.Options())


def test_tsld_weighs_tokens_that_the_teacher_does_not_expect() -> None:
    label = torch.tensor([0.9, 0.1, 0.5]).log()
    weights = tsld.weigh(label, tsld.Options(tau=2.0))
    raw = [math.exp(-math.log(p) / 2) for p in (0.9, 0.1, 0.5)]
    torch.testing.assert_close(weights, torch.tensor([3 * x / sum(raw) for x in raw]))
    torch.testing.assert_close(tsld.weigh(torch.full((4,), -1.3), tsld.Options()), torch.ones(4))
    assert tsld.weigh(torch.zeros(0), tsld.Options()).shape == (0,)


def test_gkd_on_the_lessons_is_logit_kd() -> None:
    io = whole(*drawn(9))
    torch.testing.assert_close(run("gkd", {"on_policy": 0.0, "kind": "forward"}, io), run("logit-kd", {}, io))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("divergence-kd", {"beta": 0.0}),
        ("divergence-kd", {"kind": "sideways"}),
        ("logit-kd", {"temperature": 0.0}),
        ("cakld", {"gamma": 2.0}),
        ("tsld", {"tau": 0.0}),
        ("gkd", {"on_policy": 1.5}),
        ("minillm", {"teacher_share": 1.0}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=next(iter(options))):
        methods.get(name).parse(options)


def test_all_objectives_say_that_they_are_no_steps() -> None:
    found = [x for x in methods.discover().values() if isinstance(x.spec, Objective)]
    for n, method in enumerate(found):
        with pytest.raises(PlanError, match="name it there"):
            method.spec.ordered(Task(n, method, Target(), method.parse({})), [])
