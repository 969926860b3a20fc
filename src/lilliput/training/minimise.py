"""The only optimizer loop: parameters go down the slope of a mini-batch loss, and the best state is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lilliput.errors import LilliputError

_MOMENTS, _TINY = (0.9, 0.999), 1e-8  # Adam, arXiv 1412.6980


@dataclass(frozen=True)
class Parameter:
    """A leaf that is trained; `rate` multiplies the schedule's, `low` and `high` bound it after each step."""

    value: Tensor
    rate: float = 1.0
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Schedule:
    """`steps` of length `rate` that fall linearly: step t has rate * (1 - t / steps).

    rule "sign": the sign of the gradient (Bernstein et al. 2018, arXiv 1802.04434); "adam": Kingma & Ba 2015.
    """

    steps: int
    rate: float
    rule: Literal["sign", "adam"] = "sign"


@dataclass(frozen=True)
class Descent:
    """The loss over all samples at the start and of the state that was kept, in which the parameters now are."""

    start: float
    end: float
    state: Literal["start", "best", "last"]


def minimise(
    parameters: Sequence[Parameter],
    slope: Callable[[int], float],
    whole: Callable[[], float],
    schedule: Schedule,
) -> Descent:
    """Carry out the schedule; the parameters end in the best state that is known, never worse than they came.

    slope(t): the loss of mini-batch t in units that make mini-batches comparable, its gradients added to the leaves'
    `grad` (a leaf without one stays where it is). whole(): the loss over all samples as they are now. Mini-batches are
    noisy judges, so their best state and the last one are both compared with the start on all samples.

    Raises LilliputError where a loss is not finite.
    """
    first = _finite(whole(), "before the first step")
    if schedule.steps == 0 or not parameters:
        return Descent(first, first, "start")
    start = _copy(parameters)
    best, least = start, math.inf
    move = _Adam(parameters) if schedule.rule == "adam" else _sign
    for step in range(schedule.steps):
        for p in parameters:
            p.value.grad = None
        value = _finite(slope(step), f"at step {step + 1}")
        if step and value < least:
            best, least = _copy(parameters), value
        with torch.no_grad():
            for n, p in enumerate(parameters):
                if p.value.grad is not None:
                    move(n, p, schedule.rate * p.rate * (1 - step / schedule.steps))
                    p.value.clamp_(p.low, p.high)
    for p in parameters:
        p.value.grad = None
    last = _finite(whole(), "after the last step")
    result: Descent = Descent(first, last, "last") if last < first else Descent(first, first, "start")
    if best is not start:
        after = _copy(parameters)
        _restore(parameters, best)
        check = _finite(whole(), "in the best state")
        if check < result.end:
            return Descent(first, check, "best")
        _restore(parameters, after)
    if result.state == "start":
        _restore(parameters, start)
    return result


def _finite(value: float, when: str) -> float:
    if not math.isfinite(value):
        raise LilliputError(f"the loss of a block is {value} {when}: check the calibration data, or lower lr")
    return value


def _copy(parameters: Sequence[Parameter]) -> list[Tensor]:
    return [p.value.detach().clone() for p in parameters]


def _restore(parameters: Sequence[Parameter], state: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, state, strict=True):
            p.value.copy_(value)


def _sign(_: int, p: Parameter, rate: float) -> None:
    if p.value.grad is not None:
        p.value.sub_(p.value.grad.sign_(), alpha=rate)


class _Adam:
    """torch's own would load its compiler, seconds and a hundred megabytes, for these six lines."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._first = [torch.zeros_like(p.value, requires_grad=False) for p in parameters]
        self._second = [torch.zeros_like(p.value, requires_grad=False) for p in parameters]
        self._count = [0] * len(parameters)

    def __call__(self, n: int, p: Parameter, rate: float) -> None:
        slope = p.value.grad
        if slope is None:
            return
        self._count[n] += 1
        first = self._first[n].lerp_(slope, 1 - _MOMENTS[0])
        second = self._second[n].mul_(_MOMENTS[1]).addcmul_(slope, slope, value=1 - _MOMENTS[1])
        fade = math.sqrt(1 - _MOMENTS[1] ** self._count[n])
        spread = second.sqrt().div_(fade).add_(_TINY)
        p.value.addcdiv_(first, spread, value=-rate / (1 - _MOMENTS[0] ** self._count[n]))
