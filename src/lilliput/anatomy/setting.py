"""What a config says of one block or of all: some name other head sizes or windows for each block."""

from __future__ import annotations

from typing import Any


def setting(config: Any, name: str, block: int | None = None) -> Any:
    """The value of a field for a block, or for all; None: it has none, or blocks differ and none was asked for."""
    if getattr(config, "is_heterogeneous", False) and name in config.per_layer_attributes:
        return None if block is None else getattr(config.per_layer_config[block], name, None)
    return getattr(config, name, None)


def named(config: Any, name: str) -> bool:
    """Whether the config has such a field, alike for all blocks or not."""
    several = getattr(config, "is_heterogeneous", False) and name in config.per_layer_attributes
    return bool(several) or hasattr(config, name)
