"""The config of an edited model: that of the model before with other sizes, found by trying the fields that may hold
them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lilliput.anatomy import widths
from lilliput.anatomy.model import Anatomy
from lilliput.anatomy.setting import CHOSEN, chosen, chosen_field, named, setting
from lilliput.anatomy.skeleton import Skeleton
from lilliput.anatomy.token_ids import numbering, renumbered
from lilliput.anatomy.widths import BlockSizes
from lilliput.errors import PlanError, SourceError
from lilliput.model.edit import Edit, experts_of, heads_of
from lilliput.model.weights import Model

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "inner_dim", "moe_intermediate_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PLACES = ("mlp_only_layers",)  # lists of blocks by number
_GROUPS = ("n_group", "num_expert_group", "num_expert_groups")  # experts are chosen within groups of them


def fitting(base: Model, edit: Edit, expected: Mapping[str, tuple[int, ...]]) -> Skeleton:
    """The skeleton of the base's architecture whose tensors have the expected shapes."""
    skeleton, reason = base.skeleton, ""
    for config in configs(base, edit, expected):
        try:
            type(config).from_dict(config.to_dict())  # as the folder will be opened: some sizes are refused only there
            smaller = Skeleton(config, dtype=skeleton.dtype, device=skeleton.device)
        except (SourceError, StrictDataclassError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            continue
        if dict(smaller.shapes) == expected:
            return smaller
    raise PlanError(
        f"no config of {type(skeleton.model).__name__} has the sizes that the edit leaves (its blocks, hidden "
        "channels, heads or experts are not free to choose, or would differ from block to block): choose another "
        f"ratio, or leave that kind out{f' ({reason.strip()})' if reason else ''}"
    )


def runs(anatomy: Anatomy, config: Any) -> Anatomy:
    """The anatomy of an edited model. Raises PlanError where tokens do not use as many experts as the config says."""
    used = {block.chosen for block in anatomy.blocks if block.chosen}
    if used - {chosen(config)}:
        raise PlanError(
            f"{anatomy.architecture} lets each token use {max(used)} experts where its config says {chosen(config)}: "
            "keep the number that it was made with, or more experts"
        )
    return anatomy


def configs(base: Model, edit: Edit, expected: Mapping[str, tuple[int, ...]]) -> Iterator[Any]:
    """Configs that may have the sizes that an edit leaves, likeliest first."""
    config = copy.deepcopy(base.skeleton.config)
    count = len(base.skeleton.block_names)
    if len(edit.blocks) != count:
        for name, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == count:
                setattr(config, name, type(value)(value[n] for n in edit.blocks))
        for name in (x for x in _PLACES if getattr(config, x, None)):
            setattr(config, name, [edit.blocks.index(n) for n in getattr(config, name) if n in edit.blocks])
        config.num_hidden_layers = len(edit.blocks)
    if several := widths.sizes_of(config):
        number = {block: n for n, block in enumerate(edit.blocks)}
        widths.put(config, {number[n]: x for n, x in several.items() if n in number})
    if edit.spread:
        widths.put(config, _block_sizes(base, edit, expected))
        yield config
        return
    heads = _counts(len(x) for x in edit.heads.values())
    if heads is not None:
        block = next(iter(edit.heads))
        before = len(heads_of(base.anatomy().blocks[block]))
        width = _head_width(base, block)
        for name in widths.HEADS:
            if named(config, name) and isinstance(value := setting(config, name, block), int):
                setattr(config, name, value * heads // before)
        if named(config, "head_dim") or width * before != base.skeleton.hidden_size:
            config.head_dim = width
    if edit.vocabulary is not None:
        config.vocab_size = len(edit.vocabulary)
        number, rows = numbering(edit.vocabulary), base.vocabulary
        for name, value in renumbered(config.to_dict(), number, rows, "config.json").items():
            setattr(config, name, value)
    if edit.hidden is not None:
        config.head_dim = _head_width(base, 0)
        config.hidden_size = edit.hidden
    for routed in _routed(base, edit, config):
        yield from _inner(base, edit, routed)


def _block_sizes(base: Model, edit: Edit, expected: Mapping[str, tuple[int, ...]]) -> dict[int, BlockSizes]:
    """The sizes of the linears of every block that an edit makes narrower; the config keeps those of the base."""
    if len(edit.blocks) != len(base.skeleton.block_names):
        raise RuntimeError("blocks leave in a step of their own")
    sizes: dict[int, BlockSizes] = {}
    for number in sorted({block for block, _ in edit.channels} | edit.heads.keys()):
        block, prefix = base.anatomy().blocks[number], base.skeleton.block_names[number]
        linears: dict[str, tuple[int, int]] = {}
        for x in block.linears:
            shape = expected[f"{prefix}.{x.name}.weight"]
            linears[x.name] = (shape[1], shape[0]) if x.transposed else (shape[0], shape[1])
        heads: tuple[int, int] | None = None
        if number in edit.heads:
            kept, before = len(edit.heads[number]), len(heads_of(block))
            query, shared = (setting(base.skeleton.config, name, number) for name in widths.HEADS)
            heads = int(query) * kept // before, int(shared or query) * kept // before
        sizes[number] = BlockSizes(linears, heads)
    return sizes


def _routed(base: Model, edit: Edit, config: Any) -> Iterator[Any]:
    """Configs with as many experts as an edit leaves, of which each token uses no more than there are."""
    count, top = _counts(len(x) for x in edit.experts.values()), edit.top_k
    if count is None and top is None:
        yield config
        return
    used = chosen_field(config)
    if used is None:
        raise PlanError(
            "the config does not say how many experts each token uses, by any known name: set one of "
            f"{', '.join(CHOSEN[:3])} in config.json"
        )
    most = setting(config, used) if count is None else min(setting(config, used), count)
    setattr(config, used, most if top is None else top)
    if count is None:
        yield config
        return
    before = len(experts_of(base.anatomy().blocks[next(iter(edit.experts))]))
    groups = next((x for x in (setting(config, name) for name in _GROUPS) if isinstance(x, int) and x > 1), None)
    if groups is not None and count != before:
        raise PlanError(
            f"{type(base.skeleton.model).__name__} chooses its experts within {groups} groups of equal size, and "
            "experts that leave would move others to another group: leave its experts as they are"
        )
    if not before:
        raise PlanError(
            "a block has no experts that its router was seen to choose among: leave its experts as they are"
        )
    words = [name for name, value in config.to_dict().items() if value == before and isinstance(value, int)]
    for name in dict.fromkeys((*(x for x in _EXPERTS if setting(config, x) == before), *words)):
        candidate = copy.deepcopy(config)
        setattr(candidate, name, count)
        yield candidate


def _inner(base: Model, edit: Edit, config: Any) -> Iterator[Any]:
    """Configs with as many hidden channels as an edit leaves."""
    inner = _counts(len(x) for x in edit.channels.values())
    if inner is None:
        yield config
        return
    first = next(iter(edit.channels))
    width = base.anatomy().blocks[first[0]].groups.channels[first[1]].width
    words = [name for name, value in config.to_dict().items() if value == width and isinstance(value, int)]
    for name in dict.fromkeys((*(x for x in _INNER if hasattr(config, x)), *words)):
        candidate = copy.deepcopy(config)
        setattr(candidate, name, inner)
        yield candidate


def _counts(counts: Iterator[int] | Any) -> int | None:
    """The one number that all are, or None where there are none. Raises PlanError where they differ."""
    found = set(counts)
    if len(found) > 1:
        raise PlanError(f"an edit leaves {min(found)} to {max(found)} of a kind in different blocks: engines need one")
    return next(iter(found), None)


def _head_width(base: Model, block: int) -> int:
    """Width of one query head, as the config says it or as the residual stream is divided."""
    config = base.skeleton.config
    given = setting(config, "head_dim", block)
    return int(given) if isinstance(given, int) else base.skeleton.hidden_size // int(config.num_attention_heads)


def differences(old: Any, new: Any) -> dict[str, Any]:
    """What a config says otherwise than another, under all names that transformers takes a field by."""
    before, after = old.to_dict(), new.to_dict()
    found = {key: value for key, value in after.items() if before.get(key) != value}
    aliases: dict[str, str] = getattr(new, "attribute_map", None) or {}
    return {alias: found[field] for alias, field in aliases.items() if field in found} | found


def changed(raw: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    """A config's entries with the differences where it names them, entries within entries alike."""
    return {
        key: changed(value, differences) if isinstance(value, dict) else differences.get(key, value)
        for key, value in raw.items()
    }


def whole_config(whole: Any, text: Any, before: Any) -> Any:
    """The config of a model whose language model has the config `text`, in place of `before`."""
    whole = copy.deepcopy(whole)
    inner = whole.get_text_config(decoder=True)
    for name, value in vars(text).items():
        if vars(before).get(name) != value or name not in vars(inner):
            setattr(inner, name, copy.deepcopy(value))
    return whole
