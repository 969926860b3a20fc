"""A model without some of its blocks, hidden channels and heads: every tensor is sliced while it is read.

What stays is an `Edit`, decided by a method; its sizes are known before, from shapes alone. The edited model has a
config, skeleton and anatomy of its own, so that plans, passes, exports and metrics take it for an ordinary model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from lilliput.anatomy import widths
from lilliput.anatomy.explore import explore
from lilliput.anatomy.model import Anatomy, Block, Group
from lilliput.anatomy.setting import named, setting
from lilliput.anatomy.skeleton import Skeleton
from lilliput.anatomy.widths import BlockSizes
from lilliput.errors import PlanError, SourceError
from lilliput.model.residual import Change
from lilliput.model.rotated import RotatedModel
from lilliput.model.weights import Model, stretches

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "inner_dim", "moe_intermediate_size")


@dataclass(frozen=True)
class Edit:
    """What stays of a model, in the numbers of the model that is edited.

    blocks: blocks, in order. channels: by block and by number among its MLPs (experts have one each), hidden channels.
    heads: by block, heads with their query groups. spread: the decision may divide what stays between blocks otherwise,
    at as many weights in all. hidden: of a model that is turned, the first so many channels of the
    residual stream (None: all). What is not named stays whole.
    """

    blocks: tuple[int, ...]
    channels: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    hidden: int | None = None
    spread: bool = False

    def plain(self) -> dict[str, Any]:
        """For a record of the journal."""
        return {
            "blocks": list(self.blocks),
            "channels": [[*place, list(kept)] for place, kept in self.channels.items()],
            "heads": [[block, list(kept)] for block, kept in self.heads.items()],
            "hidden": self.hidden,
            "spread": self.spread,
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Edit:
        """Undo `plain`."""
        channels = {(int(b), int(n)): tuple(kept) for b, n, kept in plain["channels"]}
        heads = {int(b): tuple(kept) for b, kept in plain["heads"]}
        return Edit(tuple(plain["blocks"]), channels, heads, plain["hidden"], bool(plain["spread"]))


def heads_of(block: Block) -> list[Group]:
    """The heads of a block, each with its query group."""
    return [x for x in block.groups.listed if x.kind == "head"]


def spreads(model: Model) -> bool:
    """Whether an edit of the model decides on sizes of its own for each block."""
    return any(isinstance(x, EditedModel) and x.edit.spread for x in views(model))


@final
class EditedModel(Model):
    """`base` without what `edit` leaves out. Raises PlanError where no config of its architecture has such sizes."""

    def __init__(
        self, base: Model, edit: Edit, *, skeleton: Skeleton | None = None, anatomy: Anatomy | None = None
    ) -> None:
        self.base, self.edit = base, edit
        self._keep = _kept(base, edit)
        self._base_name = {new: old for old, new in _renamed(base, edit).items()}
        expected = {new: self._sliced_shape(old) for new, old in self._base_name.items()}
        self.skeleton = _fitting(base, edit, expected) if skeleton is None else skeleton
        if dict(self.skeleton.shapes) != expected:
            raise RuntimeError("an edit of other sizes than those of the model that was planned")
        self.source, self.carried, self.copies, self.notes = base.source, base.carried, base.copies, base.notes
        self.refs = {name: base.refs[old] for name, old in self._base_name.items() if old in base.refs}
        self.fused = tuple(x for x in self.refs if self._base_name[x] in base.fused)
        self._anatomy = anatomy

    def with_edit(self, edit: Edit) -> EditedModel:
        """The base with another edit, of the same sizes unless it is spread."""
        if self.edit.spread:
            return EditedModel(self.base, edit)
        return EditedModel(self.base, edit, skeleton=self.skeleton, anatomy=self._anatomy)

    def over(self, base: Model) -> EditedModel:
        """The same edit of another base of the same sizes."""
        return EditedModel(base, self.edit, skeleton=self.skeleton, anatomy=self._anatomy)

    @property
    def config(self) -> Any:
        return _whole_config(self.base.config, self.skeleton.config, self.base.skeleton.config)

    @property
    def raw(self) -> Mapping[str, Any]:
        return _changed(self.base.raw, _differences(self.base.skeleton.config, self.skeleton.config))

    def anatomy(self) -> Anatomy:
        if self._anatomy is None:
            self._anatomy = explore(self.skeleton)
        return self._anatomy

    def base_block(self, block: int) -> int:
        """The number that a block has in the base."""
        return self.edit.blocks[block]

    def base_name(self, canonical: str) -> str:
        """The name that a tensor has in the base."""
        return self._base_name[canonical]

    def kept(self, canonical: str, axis: int) -> Tensor | None:
        """The indices of the base's tensor that stay along an axis, int64; None where all do."""
        return self._keep.get(self._base_name[canonical], {}).get(axis)

    def read(self, canonical: str) -> Tensor:
        value = self._scaled(canonical, self.base.read(self._base_name[canonical]))
        for axis, index in self._keep.get(self._base_name[canonical], {}).items():
            value = value.index_select(axis, index)
        return value.contiguous()

    def read_rows(self, canonical: str, start: int, stop: int) -> Tensor:
        if self._keep.get(self._base_name[canonical]):
            return self.read(canonical)[start:stop].contiguous()
        return self.base.read_rows(self._base_name[canonical], start, stop)

    def spans(self, canonical: str, rows: Tensor) -> Iterator[tuple[int, int]]:
        if self._keep.get(self._base_name[canonical]):
            return stretches(rows, self.shape(canonical)[0])
        return self.base.spans(self._base_name[canonical], rows)

    def stored_name(self, canonical: str) -> str:
        old = self._base_name.get(canonical, canonical)
        name = self.base.stored_name(old)
        for number, block in enumerate(self.edit.blocks):
            new_block, old_block = self.skeleton.block_names[number], self.base.skeleton.block_names[block]
            if old.startswith(f"{old_block}.") and number != block:
                words, before = new_block.rpartition("."), old_block.rpartition(".")
                leaf = words[0].rpartition(".")[2]
                head, _, tail = f".{name}".rpartition(f".{leaf}.{before[2]}.")
                return f"{head}.{leaf}.{words[2]}.{tail}".removeprefix(".")
        return name

    def shape(self, canonical: str) -> tuple[int, ...]:
        return self.skeleton.shapes[canonical]

    def dtype(self, canonical: str) -> torch.dtype:
        return self.base.dtype(self._base_name[canonical])

    def parts(self, canonical: str) -> tuple[str, ...]:
        return self.base.parts(self._base_name[canonical])

    def _scaled(self, canonical: str, value: Tensor) -> Tensor:
        """A norm's gain where channels have left: root mean squares are over fewer of them, with nearly all energy."""
        change = _change(self.base, self._base_name[canonical]) if self.edit.hidden is not None else None
        if self.edit.hidden is None or change is None or change.kind != "gain":
            return value
        factor = math.sqrt(self.base.skeleton.hidden_size / self.edit.hidden)
        scaled: Tensor = (value + change.offset) * factor - change.offset
        return scaled

    def _sliced_shape(self, old: str) -> tuple[int, ...]:
        keep = self._keep.get(old, {})
        return tuple(len(keep[i]) if i in keep else n for i, n in enumerate(self.base.skeleton.shapes[old]))


def _kept(base: Model, edit: Edit) -> dict[str, dict[int, Tensor]]:
    """By the base's name of a tensor, the indices that stay along an axis."""
    anatomy = base.anatomy()
    keep: dict[str, dict[int, Tensor]] = {}
    for (number, mlp), kept in edit.channels.items():
        block, channels = anatomy.blocks[number], anatomy.blocks[number].groups.channels[mlp]
        chosen = torch.tensor(kept, dtype=torch.int64)
        rows: dict[str, list[Tensor]] = {}
        for name, index in channels.rows:
            rows.setdefault(name, []).append(index[chosen])
        for name, pieces in rows.items():
            _add(keep, anatomy, number, block, name, "rows", torch.cat(pieces).sort().values)
        for name in channels.readers:
            _add(keep, anatomy, number, block, name, "columns", chosen)
    for number, kept in edit.heads.items():
        block = anatomy.blocks[number]
        spans: dict[tuple[str, str], list[Tensor]] = {}
        groups = heads_of(block)
        for head in kept:
            for name, axis, (a, b) in groups[head].members:
                spans.setdefault((name, axis), []).append(torch.arange(a, b))
        for (name, side), pieces in spans.items():
            _add(keep, anatomy, number, block, name, side, torch.cat(pieces).sort().values)
    if edit.hidden is not None:
        first = torch.arange(edit.hidden)
        for name in base.skeleton.shapes:
            change = _change(base, name)
            if change is not None:
                turned = (change.kind == "reader" and not change.transposed) or change.kind == "outside"
                turned = turned or (change.kind == "writer" and change.transposed)
                keep.setdefault(name, {})[int(turned)] = first
    return keep


def _change(base: Model, name: str) -> Change | None:
    """How a tensor takes part in the residual stream of a turned model, or of one that rests on such a one."""
    if isinstance(base, EditedModel):
        return _change(base.base, base.base_name(name))
    return base.change(name) if isinstance(base, RotatedModel) else None


def _add(
    keep: dict[str, dict[int, Tensor]], anatomy: Anatomy, number: int, block: Block, name: str, axis: str, index: Tensor
) -> None:
    linear, prefix = block.linear(name), anatomy.block_names[number]
    rows = axis == "rows"
    keep.setdefault(f"{prefix}.{name}.weight", {})[int(rows == linear.transposed)] = index
    if rows and linear.bias:
        keep.setdefault(f"{prefix}.{name}.bias", {})[0] = index


def _renamed(base: Model, edit: Edit) -> dict[str, str]:
    """The new canonical name of every tensor of the base that stays."""
    skeleton = base.skeleton
    number = {block: n for n, block in enumerate(edit.blocks)}
    inside = {name: block for block in range(len(skeleton.block_names)) for name in skeleton.names_of(block)}
    names: dict[str, str] = {}
    for name in skeleton.shapes:
        block = inside.get(name)
        if block is None:
            names[name] = name
        elif block in number:
            prefix = skeleton.block_names[block]
            names[name] = skeleton.block_names[number[block]] + name.removeprefix(prefix)
    return names


def _fitting(base: Model, edit: Edit, expected: Mapping[str, tuple[int, ...]]) -> Skeleton:
    """The skeleton of the base's architecture whose tensors have the expected shapes."""
    skeleton, reason = base.skeleton, ""
    for config in _configs(base, edit, expected):
        try:
            type(config).from_dict(config.to_dict())  # as the folder will be opened: some sizes are refused only there
            smaller = Skeleton(config, dtype=skeleton.dtype, device=skeleton.device)
        except (SourceError, StrictDataclassError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            continue
        if dict(smaller.shapes) == expected:
            return smaller
    raise PlanError(
        f"no config of {type(skeleton.model).__name__} has the sizes that the edit leaves (its blocks, hidden channels "
        "or heads are not free to choose, or would differ from block to block): choose another ratio, or leave that "
        f"kind out{f' ({reason.strip()})' if reason else ''}"
    )


def _configs(base: Model, edit: Edit, expected: Mapping[str, tuple[int, ...]]) -> Iterator[Any]:
    """Configs that may have the sizes that an edit leaves, likeliest first."""
    config = copy.deepcopy(base.skeleton.config)
    count = len(base.skeleton.block_names)
    if len(edit.blocks) != count:
        for name, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == count:
                setattr(config, name, type(value)(value[n] for n in edit.blocks))
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
    if edit.hidden is not None:
        config.head_dim = _head_width(base, 0)
        config.hidden_size = edit.hidden
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


def _differences(old: Any, new: Any) -> dict[str, Any]:
    before, after = old.to_dict(), new.to_dict()
    return {key: value for key, value in after.items() if before.get(key) != value}


def _changed(raw: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    """A config's entries with the differences where it names them, entries within entries alike."""
    return {
        key: _changed(value, differences) if isinstance(value, dict) else differences.get(key, value)
        for key, value in raw.items()
    }


def _whole_config(whole: Any, text: Any, before: Any) -> Any:
    """The config of a model whose language model has the config `text`, in place of `before`."""
    whole = copy.deepcopy(whole)
    inner = whole.get_text_config(decoder=True)
    for name, value in vars(text).items():
        if vars(before).get(name) != value or name not in vars(inner):
            setattr(inner, name, copy.deepcopy(value))
    return whole


def views(model: Model) -> Iterator[Model]:
    """A model and, one after the other, what it rests on: edited and turned models, and at last the stored one."""
    while isinstance(model, EditedModel | RotatedModel):
        yield model
        model = model.base
    yield model


def unedited(model: Model) -> Model:
    """The model before all edits and rotations."""
    *_, stored = views(model)
    return stored
