"""The text of a run: what a model is calibrated on and measured on, read before anything else is done."""

from __future__ import annotations

from lilliput import units
from lilliput.data.generate import generate_tokens
from lilliput.data.load import check, load_tokens
from lilliput.data.tokens import Tokens
from lilliput.errors import PlanError
from lilliput.metrics.slices import window
from lilliput.model.stored import Model
from lilliput.options import Calibration, Text
from lilliput.plan.plan import Plan


def read(model: Model, plan: Plan, calibration: Calibration) -> Tokens | None:
    """The calibration windows; None where no step reads any, and for text that the model is to write itself (`write`).

    Raises DataError for text that is not there, cannot be read or is too short, PlanError where the model that is to
    write its text does not fit into the budget.
    """
    if calibration.data == "self":
        _fits(plan)
        return None
    if not plan.resolved.reads_tokens:
        check(calibration.data)
        return None
    return load_tokens(
        calibration.data,
        model.source.tokenizer(),
        samples=calibration.samples,
        tokens=calibration.tokens,
        seed=calibration.seed,
        vocabulary=model.vocabulary,
    )


def write(model: Model, plan: Plan, seed: int | None) -> Tokens | None:
    """Calibration windows that the model writes itself; None where no step reads any."""
    if not plan.resolved.reads_tokens:
        return None
    tokenizer = model.source.tokenizer()
    return generate_tokens(model, tokenizer, samples=plan.samples, tokens=plan.tokens, seed=seed or 0)


def _fits(plan: Plan) -> None:
    if not plan.resolved.reads_tokens or plan.budget is None:
        return
    whole = sum(x.nbytes for x in plan.tensors if x.kind != "quantized") + plan.parameters * plan.dtype.itemsize
    if whole > plan.budget:
        raise PlanError(
            f"--data self loads the whole model to write its text, which needs {units.readable(whole)}, more than "
            f"--memory {units.readable(plan.budget)}; use --data docs or a file"
        )


def measurable(model: Model, text: Text) -> None:
    """Raises DataError unless each text, where any windows are asked for, holds what is to be measured on."""
    if not text.windows:
        return
    for data in text.data:
        load_tokens(
            data,
            model.source.tokenizer(),
            samples=text.windows,
            tokens=window(model),
            vocabulary=model.vocabulary,
        )


def known_positions(model: Model, tokens: int) -> None:
    """Raises PlanError for windows of more tokens than the model knows positions."""
    if model.positions is not None and tokens > model.positions:
        raise PlanError(f"--tokens {tokens} is more than the model's {model.positions} positions: ask for fewer")
