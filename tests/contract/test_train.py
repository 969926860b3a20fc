"""What every training method and every objective owes its callers."""

from __future__ import annotations

import pytest
import torch

from lilliput import methods
from lilliput.formats.integer import IntegerFormat
from lilliput.parts import scheme
from lilliput.parts.layer import Layer
from lilliput.parts.quantized import QuantizedPart
from lilliput.verbs.objective import Objective, Taught, TokenIO
from lilliput.verbs.train import Train

TRAIN = sorted(n for n, m in methods.discover().items() if isinstance(m.spec, Train))
TOKENS = sorted(
    n
    for n, m in methods.discover().items()
    if isinstance(m.spec, Objective) and m.spec.tokens_loss and not (m.spec.prepare or m.spec.rollout)
)


def layers() -> list[Layer]:
    """A plain linear, and one of integers."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    form = IntegerFormat(4, False, 16, torch.float32)
    grid = form.fit(weight)
    return [Layer("a", weight), Layer("a", weight).with_part(QuantizedPart(form, form.encode(weight, grid), grid))]


@pytest.mark.parametrize("name", TRAIN)
def test_what_is_written_is_what_was_trained(name: str) -> None:
    """Whatever a method admits it writes in the form in which it was, and the weight that it computes with."""
    method = methods.get(name)
    assert isinstance(method.spec, Train)
    options = method.parse({})
    for layer in layers():
        if method.spec.admits(scheme.of(layer), options) is not None:
            continue
        before = layer.weight.clone()
        core = method.spec.begin(layer, layer.weight, options)
        core.step(0.5)
        core.weight().sum().backward()
        assert any(x.grad is not None for x in core.parameters())
        written = core.finish()
        assert scheme.of(written) == scheme.of(layer)
        torch.testing.assert_close(written.decode(), core.weight().detach(), rtol=0, atol=0)
        assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", TOKENS)
def test_an_objective_is_finite_for_extreme_logits_and_leaves_its_inputs_alone(name: str) -> None:
    method = methods.get(name)
    assert isinstance(method.spec, Objective)
    assert method.spec.tokens_loss is not None
    options, draw = method.parse({}), torch.Generator().manual_seed(0)
    logits = torch.cat([torch.randn(4, 9, generator=draw), 1e4 * torch.randn(4, 9, generator=draw)]).requires_grad_()
    other = torch.randn(8, 9, generator=draw)
    log_p, ids = other.log_softmax(-1).topk(4)
    rest = other.log_softmax(-1).scatter(1, ids, -torch.inf).logsumexp(1)
    labels, before = torch.arange(8), logits.detach().clone()
    for taught in (Taught(other.log_softmax(-1)), Taught(log_p, ids, rest)):
        extra = torch.zeros(8, 4)
        loss = method.spec.tokens_loss(TokenIO(logits, labels, taught if method.spec.teaches else None, extra), options)
        assert loss.shape == (8,)
        (slope,) = torch.autograd.grad(loss.sum(), logits)
        assert bool(loss.isfinite().all())
        assert bool(slope.isfinite().all())
    assert torch.equal(logits.detach(), before)
