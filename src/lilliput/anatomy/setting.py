"""What a config says of one block or of all: some name other head sizes or windows for each block."""

from __future__ import annotations

from typing import Any

from lilliput.anatomy import widths

# How configs call the number of experts that each token goes through.
CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "top_k_experts",
    "top_k",
)  # fmt: skip


def setting(config: Any, name: str, block: int | None = None) -> Any:
    """The value of a field for a block, or for all; None: it has none, or blocks differ and none was asked for."""
    if name in widths.HEADS and (several := widths.sizes_of(config)):
        own = None if block is None else several.get(block, widths.BlockSizes()).heads
        if own is not None:
            return own[widths.HEADS.index(name)]
        if block is None and any(x.heads is not None for x in several.values()):
            return None
    if getattr(config, "is_heterogeneous", False) and name in config.per_layer_attributes:
        return None if block is None else getattr(config.per_layer_config[block], name, None)
    return getattr(config, name, None)


def named(config: Any, name: str) -> bool:
    """Whether the config has such a field, alike for all blocks or not."""
    several = getattr(config, "is_heterogeneous", False) and name in config.per_layer_attributes
    return bool(several) or hasattr(config, name)


def chosen_field(config: Any) -> str | None:
    """The field that says how many experts each token goes through; None where no known one does."""
    return next((x for x in CHOSEN if isinstance(value := setting(config, x), int) and value > 0), None)


def chosen(config: Any) -> int | None:
    """How many experts each token goes through; None where the config does not say."""
    field = chosen_field(config)
    return None if field is None else int(setting(config, field))
