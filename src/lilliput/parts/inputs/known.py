"""All kinds of grids for inputs, as config.json names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lilliput.errors import SourceError
from lilliput.parts.inputs import chosen, clusters, minifloat, mixed, pairs, policy, uniform
from lilliput.parts.inputs.grid import InputSpec

# A new kind is one file and a line here.
_WRITTEN: Mapping[str, Callable[[Mapping[str, Any]], InputSpec]] = {
    "uniform": uniform.from_plain,
    "float": minifloat.from_plain,
    "mixed": mixed.from_plain,
    "clusters": clusters.from_plain,
    "pairs": pairs.from_plain,
    "chosen": chosen.from_plain,
    "policy": policy.from_plain,
}


def from_plain(plain: Mapping[str, Any]) -> InputSpec:
    """The grid that config.json describes. Raises SourceError for a kind that this code does not know."""
    if plain["kind"] not in _WRITTEN:
        raise SourceError(
            f"a grid of kind {plain['kind']!r} for inputs is newer than this lilliput: install the version that wrote "
            "the folder"
        )
    return _WRITTEN[plain["kind"]](plain)
