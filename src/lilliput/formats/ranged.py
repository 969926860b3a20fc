"""Formats whose scales come from a range that can be covered, searched or cut: one way to fit any format."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from lilliput.errors import PlanError
from lilliput.formats.format import Format, RangeRule

__all__ = ["RangeRule", "Ranged", "Spaced", "check", "fit"]


@runtime_checkable
class Ranged(Protocol):
    """A format whose groups have ranges of the weights, which may be cut before they are covered."""

    @property
    def group_size(self) -> int:
        """Inputs in a group; -1 a row, 0 the matrix."""
        ...

    def magnitudes(self) -> Tensor:
        """The levels from 0 up, in units of the scale, float32."""
        ...


@runtime_checkable
class Spaced(Protocol):
    """A format whose levels can lie evenly about 0, none of them at it."""

    def even(self, weight: Tensor, reach: float) -> Any:
        """The grid whose levels are evenly spaced on [-r, r], r being `reach` root mean squares of `weight` [out, in]:
        the same in every group."""
        ...


def check(form: Format, how: RangeRule) -> None:
    """Raises PlanError where a format has no such range to choose."""
    if how.signed_scale and not form.signed_scales:
        raise PlanError(
            f"{form.describe()} has no scales of either sign: signed_scale belongs to integers with plain float "
            "scales; leave it out"
        )


def fit(form: Format, weight: Tensor, importance: Tensor | None, how: RangeRule, support: Tensor | None = None) -> Any:
    """The grid of `form` for `weight` [out, in]; `importance` [in] or [out, in] weighs errors where `how` searches.
    Outside `support`, bool [out, in], the weight is 0, and stays 0 in every format that can hold it.

    A format without ranges (a table fitted to the weights) is fitted in its own way, under the same importance. Raises
    PlanError as `check` does, and LilliputError for a weight or importance that is not finite.
    """
    check(form, how)
    return form.searched(weight, how, importance=importance, support=support)
