"""What follows from an option `samples`: how many calibration samples a step looks at where few tell enough."""

from __future__ import annotations

from typing import Any, Protocol


class Sampled(Protocol):
    """Options with the most samples that are looked at."""

    @property
    def samples(self) -> int: ...


def looked_at(samples: int, o: Sampled) -> int:
    """Samples, of so many."""
    return min(samples, o.samples)


def always(o: Any) -> bool:
    """For a step that reads something whatever its options say."""
    return True
