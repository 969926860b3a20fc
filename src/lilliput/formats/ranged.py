"""Formats whose scales come from a range that can be covered or searched: one way to fit any format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.affine import AffineFormat
from lilliput.formats.codebook import CodebookFormat
from lilliput.formats.format import Format
from lilliput.formats.integer import IntegerFormat
from lilliput.formats.levels import LevelFormat
from lilliput.formats.nested import NestedFormat


@dataclass(frozen=True)
class Search:
    """How a range is chosen: see `IntegerFormat.fit`."""

    search: Literal["minmax", "mse"] = "minmax"
    steps: int = 30
    norm: float = 2.0
    signed_scale: bool = False


def check(form: Format, how: Search) -> None:
    """Raises PlanError where a format has no such range to choose."""
    if how.signed_scale and not isinstance(form, IntegerFormat):
        raise PlanError(
            f"{form.describe()} has no scales of either sign: signed_scale belongs to integers with plain float "
            "scales; leave it out"
        )


def fit(form: Format, weight: Tensor, importance: Tensor | None, how: Search, support: Tensor | None = None) -> Any:
    """The grid of `form` for `weight` [out, in]; `importance` [in] or [out, in] weighs errors where `how` searches.
    Outside `support`, bool [out, in], the weight is 0, and stays 0 in every format that can hold it.

    A format without ranges (a table fitted to the weights) is fitted in its own way, under the same importance. Raises
    PlanError as `check` does, and LilliputError for a weight or importance that is not finite.
    """
    check(form, how)
    if isinstance(form, IntegerFormat):
        return form.fit(
            weight,
            search=how.search,
            importance=importance,
            steps=how.steps,
            norm=how.norm,
            signed_scale=how.signed_scale,
        )
    if isinstance(form, LevelFormat | NestedFormat):
        return form.fit(weight, search=how.search, importance=importance, steps=how.steps, norm=how.norm)
    if isinstance(form, AffineFormat):
        return form.fit(weight, importance=importance, search=how.search == "mse")
    if isinstance(form, CodebookFormat) and support is not None:
        return form.fit(weight, importance=importance, zero=~support)
    return form.fit(weight, importance=importance)
