"""Figures as people and JSON read and write them: bytes, durations, intervals, what is no number."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, overload

from rich import filesize

from lilliput.errors import PlanError

_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}{tail}": 1000 ** (i + 1) for i, letter in enumerate("kmgt") for tail in ("", "b")},
    **{f"{letter}ib": 1024 ** (i + 1) for i, letter in enumerate("kmgt")},
}


@overload
def parse_size(text: str, what: str = ...) -> int: ...
@overload
def parse_size(text: str | None, what: str = ...) -> int | None: ...
def parse_size(text: str | None, what: str = "size") -> int | None:
    """Bytes from "4GB", "1.5GiB", "400 MB" or "123456": powers of 1000 with B, of 1024 with iB; None from None. Raises
    PlanError. Not pydantic's ByteSize, which takes "4GB of RAM" and "400MBit" as well."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else "?"
    if match is None or unit not in _UNITS:
        raise PlanError(f"{what} '{text}' is not a size: write bytes, or a number with a unit, such as 400MB or 1.5GiB")
    size = int(float(match[1]) * _UNITS[unit]) if "." in match[1] else int(match[1]) * _UNITS[unit]
    if size <= 0:
        raise PlanError(f"{what} '{text}' must be more than 0 bytes")
    return size


def parse_time(text: str, what: str = "time") -> float:
    """Seconds from "12ms", "1.5 s" or "800us". Raises PlanError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise PlanError(f"{what} '{text}' is no time: write a number with a unit, such as 12ms, 800us or 1.5s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def size(count: float) -> str:
    """Bytes in units of 1000, two to four digits: "104.7 MB"."""
    return filesize.decimal(round(count))


def duration(seconds: float) -> str:
    """Seconds as "4.2 s", "42 s", "3 min 10 s" or "2 h 5 min" (the standard library's are all 0:03:10.123)."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def interval(value: Mapping[str, float], digits: int = 4) -> str:
    """A value with its 95 % interval: "1.052 [1.047, 1.058]"."""
    figures = [f"{float(value[key]):.{digits}g}" for key in ("value", "low", "high")]
    return f"{figures[0]} [{figures[1]}, {figures[2]}]"


def finite(data: Any) -> Any:
    """The same data with null for NaN and infinity, which JSON cannot say."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return data


def readable(size: float, up: bool = False) -> str:
    """Bytes as a short text that `parse_size` reads, such as 1.50GB (decimal units); `up` rounds so that the text is
    never too small."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            value = size / scale
            return f"{(int(value * 100) + 1) / 100 if up else value:.2f}{unit}"
    return f"{int(size)}B"


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, with dots where there are more: "a, b, c, ..."."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
