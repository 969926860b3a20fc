"""A narrower model of the same make, so that looking at a block costs milliseconds and no memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy import widths
from lilliput.anatomy.model import Block, Channels, Group, Groups, Link, Site
from lilliput.anatomy.setting import named, setting
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import SourceError

HIDDEN = 48  # least width of a miniature's residual stream
INNER = 24  # least number of hidden channels
_INNER_WORDS = ("intermediate", "ffn", "inner", "mlp_hidden")
_HEAD_WORDS = ("head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels")


def miniature(skeleton: Skeleton, dtype: torch.dtype = torch.float64) -> Skeleton | None:
    """The skeleton with a narrow residual stream and few hidden channels; None where there is no such thing.

    Heads and experts keep their number, and heads their size, so that every layout is the large model's.
    """
    config = copy.deepcopy(skeleton.config)
    if any(x.heads is not None for x in widths.sizes_of(config).values()):
        return None  # heads keep their number in a miniature, which has one number for all blocks
    widths.put(config, {})
    used = {size for names in skeleton.names_of(0) for size in skeleton.shapes[names]}
    heads = int(setting(config, "num_attention_heads") or 0)
    sizes: dict[str, int] = {}
    if heads and any(named(config, word) for word in ("num_key_value_heads", *_HEAD_WORDS)):
        if setting(config, "head_dim", 0) is None:
            config.head_dim = config.hidden_size // heads  # or heads would shrink with the residual stream
        sizes["hidden_size"] = _fresh(used, heads * -(-HIDDEN // heads), heads)
    for name, value in config.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool) and any(w in name for w in _INNER_WORDS):
            sizes[name] = _fresh(used, INNER, 8)
    sizes = {n: size for n, size in sizes.items() if size * 2 <= int(setting(config, n) or 0)}
    for shrunk in (sizes, {n: size for n, size in sizes.items() if n != "hidden_size"}):
        small = _build(config, shrunk, dtype) if shrunk else None
        if small is not None and _shrunk(skeleton, small, config, shrunk):
            return small
    return None


def _build(config: Any, sizes: Mapping[str, int], dtype: torch.dtype) -> Skeleton | None:
    config = copy.deepcopy(config)
    try:
        for name, size in sizes.items():
            setattr(config, name, size)
        return Skeleton(config, dtype=dtype)
    except (SourceError, ValueError, TypeError, RuntimeError, ZeroDivisionError):
        return None  # this make of model does not come narrower: it is looked at in its own size


def _shrunk(large: Skeleton, small: Skeleton, config: Any, sizes: Mapping[str, int]) -> bool:
    """Whether exactly the dimensions that are multiples of a shrunk size have become so many times the new size."""
    if large.shapes.keys() != small.shapes.keys():
        return False
    own = {
        f"{large.block_names[i]}.{name}.{kind}"
        for i, block in widths.sizes_of(large.config).items()
        for name in block.linears
        for kind in ("weight", "bias")
    }
    for name in {n for i in range(len(large.block_names)) for n in large.names_of(i)} - own:
        for old, new in zip(large.shapes[name], small.shapes[name], strict=True):
            fits = [old * size == new * int(getattr(config, n)) for n, size in sizes.items()]
            if old != new and not any(fits):
                return False
    return True


def enlarge(block: Block, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Block | None:
    """A miniature's description with the sizes of the large block; None where they do not carry over."""
    sizes: dict[str, tuple[int, int]] = {}
    for linear in block.linears:
        shape = shapes[f"{name}.{linear.name}.weight"]
        sizes[linear.name] = (shape[1], shape[0]) if linear.transposed else (shape[0], shape[1])
    old = {x.name: (x.out_features, x.in_features) for x in block.linears}
    norms = {x.producer: shapes[f"{name}.{x.producer}.weight"][0] for x in block.links if x.kind == "norm"}
    try:
        links = tuple(_link(x, block.site(x.site), sizes, old, norms) for x in block.links)
        channels = [_channels(x, sizes, old) for x in block.groups.channels]
        groups = [
            Group(g.kind, tuple((n, a, _span(s, a, sizes[n], old[n])) for n, a, s in g.members))
            for g in block.groups.listed
        ]
    except _StretchError:
        return None
    return replace(
        block,
        linears=tuple(replace(x, out_features=sizes[x.name][0], in_features=sizes[x.name][1]) for x in block.linears),
        sites=tuple(replace(s, width=sizes[s.name][1]) for s in block.sites),
        links=links,
        groups=Groups(groups, channels),
    )


class _StretchError(Exception):
    """An index of the miniature that has no counterpart in the large block."""


def _fresh(used: set[int], least: int, step: int) -> int:
    """A size that no other dimension has, so that none is mistaken for another."""
    size = least
    while size in used:
        size += step
    used.add(size)
    used.add(2 * size)
    return size


def _stretch(index: Tensor, width: int, rows: int, old_width: int, old_rows: int) -> Tensor:
    """The index [width] into rows of the large block that corresponds to one of the miniature."""
    if (width, rows) == (old_width, old_rows):
        return index
    part = int(index[0]) // old_width
    straight = torch.equal(index, part * old_width + torch.arange(old_width))
    if not straight or old_rows % old_width or rows * old_width != old_rows * width:
        raise _StretchError
    return part * width + torch.arange(width)


def _link(
    link: Link,
    site: Site,
    sizes: Mapping[str, tuple[int, int]],
    old: Mapping[str, tuple[int, int]],
    norms: Mapping[str, int],
) -> Link:
    width = sizes[site.name][1]
    rows, old_rows = norms.get(link.producer, 0), len(link.index)
    if link.kind == "linear":
        rows, old_rows = sizes[link.producer][0], old[link.producer][0]
    return replace(link, index=_stretch(link.index, width, rows, len(link.index), old_rows))


def _channels(channels: Channels, sizes: Mapping[str, tuple[int, int]], old: Mapping[str, tuple[int, int]]) -> Channels:
    width = sizes[channels.readers[0]][1]
    rows = tuple((n, _stretch(x, width, sizes[n][0], channels.width, old[n][0])) for n, x in channels.rows)
    return Channels(rows, channels.readers, width)


def _span(span: tuple[int, int], axis: str, size: tuple[int, int], old: tuple[int, int]) -> tuple[int, int]:
    new, before = (size[0], old[0]) if axis == "rows" else (size[1], old[1])
    if new == before:
        return span
    if span != (0, before):
        raise _StretchError
    return 0, new
