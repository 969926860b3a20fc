"""Sizes, durations and intervals as people write them."""

from __future__ import annotations

import pytest

from lilliput.errors import PlanError
from lilliput.units import duration, interval, parse_size, size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GB", 4 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("400MB", 400 * 10**6),
        ("400 mb", 400 * 10**6),
        ("123456", 123456),
        ("10b", 10),
        ("2k", 2000),
        ("1KiB", 1024),
        (".5TB", 5 * 10**11),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


def test_no_size_stays_none() -> None:
    assert parse_size(None, "--memory") is None


@pytest.mark.parametrize("text", ["", "GB", "4 XB", "-1GB", "0", "0.0GB", "1e9", "4GB of RAM"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(PlanError, match="--memory"):
        parse_size(text, "--memory")


def test_figures_are_printed() -> None:
    assert [size(x) for x in (7, 1500, 104_700_000, 2_500_000_000)] == ["7 bytes", "1.5 kB", "104.7 MB", "2.5 GB"]
    assert [duration(x) for x in (4.21, 42, 190, 7500)] == ["4.2 s", "42 s", "3 min 10 s", "2 h 5 min"]
    assert interval({"value": 1.0521, "low": 1.047, "high": 1.058}) == "1.052 [1.047, 1.058]"
