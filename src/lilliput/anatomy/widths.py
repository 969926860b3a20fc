"""Blocks whose linears have other sizes than the config gives: an entry of the config of its own, and what it does.

The entry `block_sizes` has for each such block, by number, the linears that differ with their [out, in], and its
attention's numbers of query and of key-value heads where these do. transformers builds all blocks by one config; here
and in the native layout they are resized right after, before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lilliput.errors import SourceError

KEY = "block_sizes"
HEADS = ("num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class BlockSizes:
    """linears: [out, in] by their names in the block; heads: numbers of query and key-value heads, None where they are
    the config's."""

    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    heads: tuple[int, int] | None = None

    def plain(self) -> dict[str, Any]:
        """For config.json."""
        heads = {} if self.heads is None else {"heads": list(self.heads)}
        return {"linears": {name: list(size) for name, size in self.linears.items()}, **heads}


def sizes_of(config: Any) -> dict[int, BlockSizes]:
    """By number, the blocks that differ from the rest of the config. Raises SourceError for a broken entry."""
    plain = getattr(config, KEY, None) or {}
    try:
        return {int(n): _block(x) for n, x in plain.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SourceError(f"the entry {KEY} of config.json is broken: write or download the folder again") from None


def _block(plain: Mapping[str, Any]) -> BlockSizes:
    linears = {str(name): (int(out), int(width)) for name, (out, width) in plain["linears"].items()}
    if min((side for size in linears.values() for side in size), default=1) < 1:
        raise ValueError("a linear without rows or columns")
    heads = plain.get("heads")
    return BlockSizes(linears, None if heads is None else (int(heads[0]), int(heads[1])))


def put(config: Any, sizes: Mapping[int, BlockSizes]) -> None:
    """Write the entry into a config, or take it out where no block differs."""
    if sizes:
        setattr(config, KEY, {str(n): sizes[n].plain() for n in sorted(sizes)})
    elif hasattr(config, KEY):
        delattr(config, KEY)


def differ(config: Any) -> str | None:
    """Why an engine that builds all blocks by one config cannot hold the model; None where it can."""
    if not sizes_of(config):
        return None
    return "its blocks differ in width, and the engine has one width for all. Nearest: edits with uniform: true"


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder layers: the outermost module list with the most parameters. SourceError: it has none."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise SourceError(f"{type(model).__name__} has no list of blocks: its layers cannot be streamed")
    name, layers = max(outer, key=lambda x: sum(p.numel() for p in x[1].parameters()))
    return tuple(f"{name}.{i}" for i in range(len(layers)))


def resize(model: nn.Module, config: Any) -> None:
    """Give the linears of a model without weights the sizes that its text config names. Raises SourceError where it has
    no such linear."""
    sizes = sizes_of(config)
    if not sizes:
        return
    blocks, modules = find_blocks(model), dict(model.named_modules())
    for number, block in sizes.items():
        for name, (out, width) in block.linears.items():
            module = modules.get(f"{blocks[number]}.{name}") if number < len(blocks) else None
            if module is None or not _resized(module, out, width):
                raise SourceError(
                    f"config.json gives '{name}' of block {number} a size of its own, and {type(model).__name__} of "
                    "this transformers has no such linear: load it with the transformers named in lilliput.json"
                )


def _resized(module: nn.Module, out: int, width: int) -> bool:
    """Change the sizes of a linear or Conv1D; False for anything else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = out, width
        shape = (out, width)
    elif isinstance(module, Conv1D):
        module.nf, module.nx = out, width
        shape = (width, out)
    else:
        return False
    for key, size in (("weight", shape), ("bias", (out,))):
        old = module._parameters.get(key)
        if old is not None:
            value = torch.empty(size, dtype=old.dtype, device=old.device)
            module._parameters[key] = nn.Parameter(value, requires_grad=old.requires_grad)
    return True
