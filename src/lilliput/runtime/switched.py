"""What a model does beyond transformers' own code can rest for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Switched(Protocol):
    """Something of a model that runs while it is `active`."""

    active: bool


@contextmanager
def off(states: Iterable[Switched | None]) -> Iterator[None]:
    """None of these is active while the context lasts; afterwards each is as it was."""
    found = [x for x in states if x is not None]
    before = [x.active for x in found]
    for state in found:
        state.active = False
    try:
        yield
    finally:
        for state, active in zip(found, before, strict=True):
            state.active = active
