"""Tensors that look broken rather than compressed: each against its own kind in the other blocks.

Compression treats the tensors of one role alike from block to block. A tensor whose level or error stands far out from
its role's is more likely a damaged file, and which of the two stands out says what: a level, its scales; an error, its
codes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lilliput.attribution.weights import WeightLoss

_SPREAD = 8.0  # times the median deviation of the role
_LEVEL = math.log(1.15)
_ERROR = math.log(2.0)
_SHARE = 0.6
_FIT = 0.7  # cosine to the original's under which a tensor is not merely scaled


@dataclass(frozen=True)
class Suspect:
    """tensor: stored name of what looks damaged; linear: whose it is; factor: compressed over original, 1 for none."""

    tensor: str
    linear: str
    factor: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def find(losses: Sequence[WeightLoss], stored: Callable[[str, str], str]) -> list[Suspect]:
    """Suspects, the worst first. `stored(linear, part)`: stored name of a linear's part, "scale" or "codes"."""
    roles: dict[str, list[WeightLoss]] = defaultdict(list)
    for loss in losses:
        roles[loss.role].append(loss)
    scaled = {x.name: _away(x.level, [y.level for y in role], _LEVEL) for role in roles.values() for x in role}
    alone = {x.name: abs(x.raw - _middle([y.raw for y in roles[x.role]])) for x in losses}
    ranked: list[tuple[float, Suspect]] = []
    for role in roles.values():
        errors = [math.log(max(x.error, 1e-9)) for x in role]
        usual_level, usual_error = math.exp(_middle([x.level for x in role])), math.exp(median(errors))
        for x, error in zip(role, errors, strict=True):
            other = x.partner if x.partner is not None and scaled[x.partner] > 0.0 else None
            # A level that damage has moved is most of the error; coarse codes move it by a small part of theirs.
            shifted = abs(math.expm1(x.level - _middle([y.level for y in role]))) > _SHARE * x.error
            mine = other is None or alone[x.name] >= alone[other]
            if scaled[x.name] > 0.0 and x.fit > _FIT and shifted and mine:
                value = math.exp(x.level)
                factor = value / usual_level
                reason = f"its values are {value:.2f} times the original's, where its kind has {usual_level:.2f}"
                ranked.append((10.0 + scaled[x.name], Suspect(stored(x.name, "scale"), x.name, factor, reason)))
            elif other is None and x.error > max(0.02, usual_error) and (away := _away(error, errors, _ERROR)) > 0.0:
                reason = f"its relative error is {x.error:.3g}, where its kind has {usual_error:.3g}"
                ranked.append((away, Suspect(stored(x.name, "codes"), x.name, 1.0, reason)))
            elif x.rows is not None and x.rows.count > 0:
                many = f"{x.rows.count} rows" if x.rows.count > 1 else f"row {x.rows.row}"
                reason = (
                    f"{many} of it, the worst at row {x.rows.row}, are up to {x.rows.worst:.3g} off, where half of its "
                    f"rows are less than {x.rows.usual:.3g} off"
                )
                ranked.append(
                    (math.log(x.rows.worst / x.rows.usual), Suspect(stored(x.name, "codes"), x.name, 1.0, reason))
                )
            elif x.entries is not None and x.entries.count > 0:
                many = f"{x.entries.count} entries" if x.entries.count > 1 else f"entry {x.entries.entry}"
                factor = math.exp(x.entries.worst)
                reason = (
                    f"{many} of it, off by a factor of up to {factor:.3g} at {x.entries.entry}: nothing after "
                    "it makes up for that"
                )
                ranked.append((x.entries.worst, Suspect(stored(x.name, "codes"), x.name, 1.0, reason)))
    return [suspect for _, suspect in sorted(ranked, key=lambda pair: (-pair[0], pair[1].tensor))]


def _middle(kind: Sequence[float]) -> float:
    return median(kind) if len(kind) >= 3 else 0.0


def _away(value: float, kind: Sequence[float], least: float) -> float:
    """By how much the value lies outside what its kind allows; 0 where it does not. Three of a kind are the fewest that
    can tell; fewer are held against the least alone."""
    middle = _middle(kind)
    if len(kind) < 3 and least == _ERROR:
        return 0.0
    spread = 1.4826 * median([abs(x - middle) for x in kind]) if len(kind) >= 3 else 0.0
    return max(0.0, abs(value - middle) - max(_SPREAD * spread, least))
