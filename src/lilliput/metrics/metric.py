"""What a file that measures something says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Declared as METRIC at the end of the file; its docstring is the page, its name the metric's name.

    how: the command that measures it; key: where its answer is in that command's JSON (docs/report.md for `eval`),
    several divided by commas; unit: of the figures; interval: what their 95 % interval comes from, or why there is
    none; covers: ids of the literature that it is an implementation of; paper: whose definition it follows, None for
    the field's common one.
    """

    how: str
    key: str
    unit: str
    interval: str
    covers: tuple[str, ...] = ()
    paper: str | None = None
