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


def read(model: Model, made: Plan, told: Calibration) -> Tokens | None:
    """The calibration windows; None where no step reads any, and for text that the model is to write itself (`write`).

    Raises DataError for text that is not there, cannot be read or is too short, PlanError where the model that is to
    write its text does not fit into the budget.
    """
    if told.data == "self":
        _fits(made)
        return None
    if not made.resolved.reads_tokens:
        check(told.data)
        return None
    return load_tokens(
        told.data,
        model.source.tokenizer(),
        samples=told.samples,
        tokens=told.tokens,
        seed=told.seed,
        vocabulary=model.vocabulary,
    )


def write(model: Model, made: Plan, seed: int | None) -> Tokens | None:
    """Calibration windows that the model writes itself; None where no step reads any."""
    if not made.resolved.reads_tokens:
        return None
    tokenizer = model.source.tokenizer()
    return generate_tokens(model, tokenizer, samples=made.samples, tokens=made.tokens, seed=seed or 0)


def _fits(made: Plan) -> None:
    if not made.resolved.reads_tokens or made.budget is None:
        return
    whole = sum(x.nbytes for x in made.tensors if x.kind != "quantized") + made.parameters * made.dtype.itemsize
    if whole > made.budget:
        raise PlanError(
            f"--data self loads the whole model to write its text: that needs {units.readable(whole)}, more than "
            f"--memory {units.readable(made.budget)}; use --data docs or a file"
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
        raise PlanError(
            f"--tokens {tokens} is more than the {model.positions} positions that the model knows: ask for fewer"
        )
