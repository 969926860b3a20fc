"""my-method against its equations, written out in float64."""

from __future__ import annotations

import torch

from lilliput.methods.objective.my_method import Options, loss
from lilliput.verbs.objective import Taught, TokenIO

TOKENS, VOCABULARY = 5, 11


def test_my_method_is_what_the_equations_say() -> None:
    draw = torch.Generator().manual_seed(0)
    own, other = (torch.randn(TOKENS, VOCABULARY, generator=draw) for _ in range(2))
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    found = loss(TokenIO(own, labels, Taught(other.log_softmax(-1))), Options())
    # replace: your equations, as obvious as can be
    expected = [
        float((p - q).square().sum()) for p, q in zip(other.double().softmax(1), own.double().softmax(1), strict=True)
    ]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_my_method_is_nothing_where_the_student_is_the_teacher() -> None:
    logits = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    taught = Taught(logits.log_softmax(-1))
    assert float(loss(TokenIO(logits, torch.zeros(TOKENS, dtype=torch.int64), taught), Options()).abs().max()) < 1e-6
