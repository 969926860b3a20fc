"""Objectives on text that the student has written: MiniLLM's estimate against the exact gradient, and its pieces."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lilliput.algebra.divergences import mixed
from lilliput.methods.objective import gkd, minillm
from lilliput.verbs.objective import RolloutIO, Taught, TokenIO

V, LENGTH = 3, 3
CONTEXTS = [c for n in range(LENGTH) for c in itertools.product(range(V), repeat=n)]  # what was written before
TEXTS = list(itertools.product(range(V), repeat=LENGTH))


def tables() -> tuple[Tensor, Tensor]:
    """Logits of teacher and student after each context, float64."""
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(len(CONTEXTS), V, generator=generator, dtype=torch.float64) for _ in range(2))
    return z, v


def along(log: Tensor, text: tuple[int, ...]) -> Tensor:
    """Log-probability of each token of a text."""
    return torch.stack([log[CONTEXTS.index(text[:t]), y] for t, y in enumerate(text)])


def exact(z: Tensor, v: Tensor) -> Tensor:
    """Gradient of KL(student || teacher) of whole texts."""
    leaf = v.clone().requires_grad_()
    log_q, log_p = leaf.log_softmax(-1), z.log_softmax(-1)
    total = torch.stack([along(log_q, y).sum().exp() * (along(log_q, y) - along(log_p, y)).sum() for y in TEXTS]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def estimated(z: Tensor, v: Tensor, o: minillm.Options) -> Tensor:
    """The mean gradient over all texts, each as often as it is drawn."""
    leaf = v.clone().requires_grad_()
    log_q, log_p = v.log_softmax(-1), z.log_softmax(-1)
    counts = torch.ones(1, LENGTH, dtype=torch.bool)
    for text in TEXTS:
        q, p = along(log_q, text), along(log_p, text)
        drawn = mixed(p, q, o.teacher_share)
        future = minillm.returns((p - q)[None], counts, o.normalised)[0]
        places = [CONTEXTS.index(text[:t]) for t in range(LENGTH)]
        extra = torch.stack([torch.ones(LENGTH, dtype=torch.float64), future, drawn], -1)
        io = TokenIO(leaf[places], torch.tensor(text), Taught(log_p[places]), extra)
        (minillm.loss(io, o).sum() * drawn.sum().exp()).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def test_the_estimate_is_the_exact_gradient() -> None:
    z, v = tables()
    options = minillm.Options(teacher_share=0.0, clip=None, normalised=False)
    torch.testing.assert_close(estimated(z, v, options), exact(z, v), rtol=1e-9, atol=1e-9)


def test_with_the_teachers_share_it_points_the_same_way() -> None:
    z, v = tables()
    found = estimated(z, v, minillm.Options(teacher_share=0.2, clip=None, normalised=False))
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), exact(z, v).flatten(), dim=0)
    assert float(cosine) > 0.95


def test_equal_models_have_no_reward_and_no_gradient() -> None:
    z, _ = tables()
    found = estimated(z, z, minillm.Options(teacher_share=0.2))
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_returns_are_means_of_what_is_still_to_come() -> None:
    rewards = torch.tensor([[9.0, 1.0, 2.0, 4.0, 7.0]])
    counts = torch.tensor([[False, True, True, True, False]])  # a prompt before, padding after
    assert minillm.returns(rewards, counts, normalised=True).tolist()[0][1:4] == [3.0, 4.0, 0.0]
    assert minillm.returns(rewards, counts, normalised=False).tolist()[0][1:4] == [6.0, 4.0, 0.0]


def token(own: float, drawn: float, future: float, o: minillm.Options) -> tuple[float, float]:
    """The loss of one written token without its KL, for a student that gives it the probability `own`, and the
    gradient of its logit."""
    logits = torch.tensor([[own, 1 - own]], dtype=torch.float64).log().requires_grad_()
    extra = torch.tensor([[1.0, future, torch.tensor(drawn).log()]], dtype=torch.float64)
    taught = Taught(logits.detach().log_softmax(-1))
    loss = minillm.loss(TokenIO(logits, torch.tensor([0]), taught, extra), o).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return float(loss.detach()), float(logits.grad[0, 0])


def test_weights_are_one_without_a_teacher_and_clipped_as_in_ppo() -> None:
    loss, slope = token(0.5, 0.5, 2.0, minillm.Options(teacher_share=0.0))
    assert loss == pytest.approx(-2.0)
    assert slope == pytest.approx(-2.0 * 0.5)
    loss, slope = token(0.5, 0.25, 2.0, minillm.Options())  # a weight of 2 that would grow
    assert (loss, slope) == (pytest.approx(-1.2 * 2.0), pytest.approx(0.0))
    loss, slope = token(0.5, 0.25, -2.0, minillm.Options())  # and one that is to shrink
    assert loss == pytest.approx(4.0)
    assert slope > 0


def io(ids: Tensor, counts: Tensor) -> RolloutIO:
    """A writer that adds one to each token after the prompt."""

    def write(share: float, temperature: float, prompt: int) -> tuple[Tensor, Tensor]:
        written = torch.zeros_like(counts)
        written[:, prompt:] = True
        return torch.where(written, ids + 1, ids), written

    return RolloutIO(ids, counts, write, lambda x: (x * -0.5, x * -0.25))


def test_lessons_follow_what_was_written() -> None:
    ids, counts = torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.bool)
    both = minillm.rollout(io(ids, counts), minillm.Options(prompt=2))
    assert both.extra is not None
    assert both.ids.tolist() == [[0, 1, 3, 4], [4, 5, 7, 8], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert both.counts[:2, :2].sum() == 0
    assert both.extra[:2, :, 0].min() == 1
    assert both.extra[2:].abs().max() == 0
    torch.testing.assert_close(both.extra[0, 2, 1], torch.tensor(1.0))  # the reward of the one token that is left
    alone = minillm.rollout(io(ids, counts), minillm.Options(prompt=2, plain=0.0))
    assert len(alone.ids) == 2


def test_a_lessons_token_loses_its_cross_entropy_alone() -> None:
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0])
    given = TokenIO(logits, labels, Taught(torch.zeros(4, V).log_softmax(-1)), torch.zeros(4, 3))
    expected = 0.5 * torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(minillm.loss(given, minillm.Options(plain=0.5)), expected)


def test_gkd_draws_its_source_with_the_probability_that_it_is_told() -> None:
    given = io(torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.bool))
    torch.manual_seed(0)
    own = [gkd.rollout(given, gkd.Options(on_policy=0.25, prompt=1)) is not None for _ in range(400)]
    assert 70 < sum(own) < 130
    assert all(gkd.rollout(given, gkd.Options(on_policy=1.0)) is not None for _ in range(50))
    assert all(gkd.rollout(given, gkd.Options(on_policy=0.0)) is None for _ in range(50))
