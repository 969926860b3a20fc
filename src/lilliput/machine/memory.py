"""Memory of this process and what the machine has left; everything counts above a fresh `import lilliput.api`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager

MB = 1 << 20
# The model class's own modules, tokenizer and buffers, allocator slack: measured on SmolLM2 and Llama-shaped models.
BASE = 160 * MB
SLACK = 1.06
GROWN = 32 * MB  # glibc's largest threshold for mapping
FORWARD = GROWN


def room(budget: int | None, processes: int = 1) -> int:
    """Bytes that each of so many processes may take: the budget, or its part of half the free memory."""
    return budget if budget is not None else max(available() // (2 * processes), 1)


def available() -> int:
    """Bytes that this process may still take (physical memory that is free or reclaimable)."""
    import psutil

    return int(psutil.virtual_memory().available)


def peak_rss() -> int:
    """High-water mark of this process's resident memory in bytes, file pages included (VmHWM, which psutil does not
    tell; getrusage's may be that of the process that started this one)."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            match = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    except OSError:
        match = None
    if match:
        return int(match[1]) * 1024
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def resident() -> int:
    """Resident memory of this process now, in bytes, file pages included."""
    import psutil

    return int(psutil.Process().memory_info().rss)


# Resident memory when all of the package had been imported: what budgets and reports count from.
_base: int | None = None


def set_base() -> None:
    """Remember the present resident memory as the base. `lilliput.api`, which imports all of the package, torch and
    transformers, calls this once, at its end."""
    global _base
    _base = resident()


def based() -> None:
    """Make sure that there is a base, by importing the rest of the package where a caller has imported parts of it."""
    if _base is None:
        importlib.import_module("lilliput.api")


def peak_above_base() -> int:
    """Peak resident memory in bytes above that of the freshly imported package."""
    based()
    return max(0, peak_rss() - (_base or 0))


@contextmanager
def steady(largest: int = 3 * MB) -> Iterator[None]:
    """While the context lasts, glibc maps tensors of `largest` bytes or more one by one: freed, they are given back.

    By default the threshold grows with use, large tensors end up on the heap, and what a run holds at its fullest stays
    with the process: on SmolLM2 that took 370 MB where 230 to 300 do. A threshold of 1 MB would save another 40 MB, but
    every tensor then is faulted in page by page, which cost a fifth of the time. `FORWARD` is for forward passes and
    heads, whose tensors come and go in the same few sizes.

    glibc cannot be told to let the threshold grow again. After the outermost context it is set to the most that it
    would have reached by itself in a process that frees large tensors (`GROWN`).
    """
    _thresholds.append(largest)
    _set_threshold(largest)
    try:
        yield
    finally:
        _thresholds.pop()
        trim()
        _set_threshold(_thresholds[-1] if _thresholds else GROWN)


_thresholds: list[int] = []  # of the contexts that are open, the innermost last


def _set_threshold(size: int) -> None:
    _mallopt(-3, size)  # M_MMAP_THRESHOLD
    _mallopt(-1, (2 if size == GROWN else 8) * size)  # M_TRIM_THRESHOLD


def own_process() -> None:
    """What only a process that is ours alone may set, for it cannot be undone: one heap for all threads."""
    _mallopt(-8, 1)  # M_ARENA_MAX


def _mallopt(parameter: int, value: int) -> None:
    """Set a parameter of glibc's allocator; nothing where there is another one."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").mallopt(parameter, value)
    except (OSError, AttributeError):
        return


def trim() -> None:
    """Give freed memory back to the operating system (glibc keeps it otherwise)."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
