"""Objectives that compare what models show, against float64 loops over their equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilliput import methods
from lilliput.algebra.compared import Distance, Scale, distance, flow, relation, side_by_side, similarities
from lilliput.methods.objective import ted
from lilliput.verbs.objective import FeatureIO, Objective, Seen, Widths

B, T, H, HEADS, D = 2, 5, 6, 2, 3
COUNTS = torch.tensor([[True, True, True, True, False], [False, True, True, False, False]])
NAMES = ["feature-kd", "minilm", "tinybert", "ted", "relation-kd"]


def seen(seed: int, blocks: int = 2, width: int = H) -> Seen:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = [draw(B, HEADS, T, T).masked_fill(future, -torch.inf) for _ in range(blocks)]
    return Seen(
        hidden=[draw(B, T, width) for _ in range(blocks + 1)],
        scores=scores,
        values=[draw(B, HEADS, T, D) for _ in range(blocks)],
    )


def head(x: Tensor) -> Tensor:
    return x[:, :4] * 2


def batch(student: Seen, teacher: Seen, maps: nn.Module | None = None) -> FeatureIO:
    labels = torch.arange(B * T).view(B, T) % 4
    return FeatureIO(student, teacher, COUNTS, labels, maps, (head, head))


def spec(name: str) -> Objective[Any]:
    found = methods.get(name).spec
    assert isinstance(found, Objective)
    return found


def loss(name: str, io: FeatureIO, **options: Any) -> Tensor:
    compare = spec(name).features_loss
    assert compare is not None
    return compare(io, methods.get(name).parse(options))


def made(name: str, widths: Widths, **options: Any) -> nn.Module | None:
    torch.manual_seed(0)
    maps = spec(name).maps
    return None if maps is None else maps(widths, methods.get(name).parse(options))


def with_grad(x: Seen) -> tuple[Seen, list[Tensor]]:
    def leaves(found: Any) -> list[Tensor]:
        return [y.clone().requires_grad_() for y in found]

    fresh = Seen(leaves(x.hidden), (), leaves(x.scores), leaves(x.values))
    return fresh, [*fresh.hidden, *fresh.scores, *fresh.values]


@pytest.mark.parametrize("name", NAMES)
def test_equal_models_lose_nothing(name: str) -> None:
    maps = made(name, Widths(H, H, 2, 2))
    assert float(loss(name, batch(seen(0), seen(0), maps)).detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(loss(name, batch(seen(0), seen(1), maps)).detach()) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_maps_and_the_student_get_gradients_and_the_teacher_none(name: str) -> None:
    maps = made(name, Widths(H, H + 2, 2, 2))
    student, own = with_grad(seen(0))
    teacher, other = with_grad(seen(1, width=H + 2))
    loss(name, batch(student, teacher, maps)).backward()  # type: ignore[no-untyped-call]
    assert any(x.grad is not None and float(x.grad.abs().max()) > 0 for x in own)
    assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in own)
    assert all(x.grad is None for x in other)
    for key, x in () if maps is None else maps.named_parameters():
        assert (x.grad is None) == key.startswith("teacher."), key


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_tokens_that_count_loses_nothing(name: str) -> None:
    student, own = with_grad(seen(0))
    io = batch(student, seen(1), made(name, Widths(H, H, 2, 2)))
    found = loss(name, FeatureIO(io.student, io.teacher, torch.zeros_like(COUNTS), io.labels, io.maps, io.heads))
    found.backward()  # type: ignore[no-untyped-call]
    assert float(found.detach()) == 0.0
    assert all(x.grad is None or float(x.grad.abs().max()) == 0.0 for x in own)


@pytest.mark.parametrize("scale", ["layer", "token", "none"])
@pytest.mark.parametrize("kind", ["l2", "l1", "cosine"])
def test_a_distance_is_that_of_its_equation(kind: Distance, scale: Scale) -> None:
    a, b = (seen(n).hidden[0] for n in (0, 1))
    total, size, count = 0.0, 0.0, 0
    for row, column in COUNTS.nonzero().tolist():
        x, y = a[row, column].double(), b[row, column].double()
        count += 1
        if kind == "cosine":
            total += 1 - float(x @ y / (x.norm() * y.norm()))
            continue
        if scale == "token":
            x, y = x / x.norm() * math.sqrt(H), y / y.norm() * math.sqrt(H)
        power = 2 if kind == "l2" else 1
        total += float((x - y).abs().pow(power).mean())
        size += float(y.abs().pow(power).mean())
    expected = total / size if scale == "layer" and kind != "cosine" else total / count
    assert float(distance(a, b, COUNTS, kind, scale)) == pytest.approx(expected, rel=1e-5)


def test_blocks_stand_side_by_side() -> None:
    assert side_by_side(2, 6, "skip") == (3, 6)
    assert side_by_side(2, 6, "last") == (5, 6)
    assert side_by_side(3, 3, "skip") == side_by_side(3, 3, "last") == (1, 2, 3)
    assert side_by_side(3, 2, "last") == (1, 1, 2)
    assert side_by_side(4, 2, "skip")[-1] == 2


def test_feature_kd_maps_blocks_as_it_is_told() -> None:
    student, teacher = seen(0, 2), seen(1, 4)

    def between(ours: int, theirs: int) -> float:
        return float(distance(student.hidden[ours], teacher.hidden[theirs], COUNTS, "l1", "none"))

    io = batch(student, teacher)
    for layers, places in (("skip", (2, 4)), ("last", (3, 4))):
        found = loss("feature-kd", io, layers=layers, distance="l1", scale="none", weight=0.5)
        assert float(found) == pytest.approx(0.25 * sum(between(n + 1, m) for n, m in enumerate(places)))
    best = [min(between(n, m) for m in range(1, 5)) for n in (1, 2)]
    found = loss("feature-kd", io, layers="dynamic", distance="l1", scale="none")
    assert float(found) == pytest.approx(sum(best) / 2)


def test_minilm_is_that_of_its_equation_and_knows_no_rotation_of_values() -> None:
    student, teacher = seen(0), seen(1)
    places = COUNTS.nonzero().tolist()
    total = 0.0
    for row, t in places:
        for h in range(HEADS):
            a = teacher.scores[-1][row, h, t].double().softmax(-1)
            b = student.scores[-1][row, h, t].double().softmax(-1)
            total += sum(float(x * (x / y).log()) for x, y in zip(a, b, strict=True) if x > 0)
            others = [u for u in range(T) if bool(COUNTS[row, u])]
            p, q = (
                (x.values[-1][row, h, others].double() @ x.values[-1][row, h, t].double() / math.sqrt(D)).softmax(0)
                for x in (teacher, student)
            )
            total += float((p * (p / q).log()).sum())
    expected = total / (len(places) * HEADS)
    assert float(loss("minilm", batch(student, teacher))) == pytest.approx(expected, rel=1e-5)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))[0]
    turned = Seen(student.hidden, (), student.scores, [x @ turn for x in student.values])
    assert float(loss("minilm", batch(turned, teacher))) == pytest.approx(expected, rel=1e-5)
    wide = Seen(student.hidden, (), student.scores, [torch.cat([x, x], -1) for x in student.values])
    loss("minilm", batch(wide, teacher))  # heads of another width
    torch.testing.assert_close(relation(student.values[0], COUNTS).exp().sum(-1), torch.ones(B, HEADS, T))


def test_tinybert_is_that_of_its_equation() -> None:
    student, teacher = seen(0, 2), seen(1, 4)
    hidden = [distance(student.hidden[n], teacher.hidden[2 * n], COUNTS, "l2", "layer") for n in range(3)]
    squares: list[float] = []
    for block in range(2):
        found = [
            float(student.scores[block][r, h, t, u] - teacher.scores[2 * block + 1][r, h, t, u]) ** 2
            for r, t in COUNTS.nonzero().tolist()
            for h in range(HEADS)
            for u in range(t + 1)
        ]
        squares.append(sum(found) / len(found))
    expected = float(hidden[0]) + float(hidden[1] + hidden[2]) / 2 + sum(squares) / 2
    assert float(loss("tinybert", batch(student, teacher))) == pytest.approx(expected, rel=1e-5)
    without = loss("tinybert", batch(student, teacher), attention=False)
    assert float(without) == pytest.approx(expected - sum(squares) / 2, rel=1e-4)


def test_ted_trains_filters_by_the_text_and_then_compares_what_they_give() -> None:
    widths = Widths(H, H, 2, 2)
    maps = made("ted", widths)
    assert isinstance(maps, ted.Filters)
    io = batch(seen(0), seen(1), maps)
    first = spec("ted").opening_loss
    assert first is not None
    options = methods.get("ted").parse({})
    expected = 0.0
    for x in (seen(0), seen(1)):
        for states in x.hidden[1:]:
            log_p = head(states[COUNTS].double()).log_softmax(-1)
            expected += float(-log_p.gather(1, io.labels[COUNTS][:, None]).mean())
    assert float(first(io, options).detach()) == pytest.approx(expected, rel=1e-5)  # filters begin as the identity
    optimizer = torch.optim.SGD(maps.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        value = first(io, options)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    pairs = [
        distance(
            maps.student[n](io.student.hidden[n + 1]), maps.teacher[n](io.teacher.hidden[n + 1]), COUNTS, "l2", "layer"
        )
        for n in range(2)
    ]
    assert float(loss("ted", io).detach()) == pytest.approx(float(sum(pairs).detach()) / 2, rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["flow", "pairwise"])
def test_relation_kd_is_that_of_its_equation(kind: str) -> None:
    student, teacher = seen(0), seen(1)
    terms = []
    for n in (1, 2):
        grams = []
        for x in (student, teacher):
            if kind == "flow":
                gram = torch.zeros(H, H, dtype=torch.float64)
                for r, t in COUNTS.nonzero().tolist():
                    a, b = (x.hidden[m][r, t].double() for m in (n - 1, n))
                    gram += torch.outer(a / a.norm(), b / b.norm()) * H / int(COUNTS.sum())
            else:
                gram = torch.zeros(B, T, T, dtype=torch.float64)
                for r, t in COUNTS.nonzero().tolist():
                    for u in range(T):
                        if bool(COUNTS[r, u]):
                            a, b = x.hidden[n][r, t].double(), x.hidden[n][r, u].double()
                            gram[r, t, u] = a @ b / (a.norm() * b.norm())
            grams.append(gram)
        terms.append(float((grams[0] - grams[1]).square().sum() / grams[1].square().sum()))
    found = loss("relation-kd", batch(student, teacher), kind=kind)
    assert float(found) == pytest.approx(sum(terms) / 2, rel=1e-5)


def test_pairwise_relations_know_no_rotation_and_flow_is_one_product() -> None:
    x = seen(0).hidden[0]
    turn = torch.linalg.qr(torch.randn(H, H, generator=torch.Generator().manual_seed(3)))[0]
    torch.testing.assert_close(similarities(x @ turn, COUNTS), similarities(x, COUNTS))
    torch.testing.assert_close(flow(x, x @ turn, COUNTS), flow(x, x, COUNTS) @ turn)


def test_models_that_cannot_be_compared_are_refused() -> None:
    heads = Widths(H, H, 2, 2, (4, 2), (4, 2))
    wider = Widths(H, 2 * H, 2, 2, (2, 2), (2, 2))

    def refused(name: str, widths: Widths, **options: Any) -> str | None:
        return spec(name).refuses(widths, methods.get(name).parse(options))

    assert "head by head" in str(refused("minilm", heads))
    assert "head by head" in str(refused("tinybert", heads))
    assert refused("tinybert", heads, attention=False) is None
    assert "kind: pairwise" in str(refused("relation-kd", wider, kind="flow"))
    assert all(refused(name, wider) is None for name in NAMES)
