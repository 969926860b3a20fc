"""A model without some of its blocks, hidden channels, heads and experts: tensors are sliced while they are read.

What stays is an `Edit`, decided by a method; its sizes are known before, from shapes alone. The edited model has a
config, skeleton and anatomy of its own, so that plans, passes, exports and metrics take it for an ordinary model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from safetensors import safe_open
from torch import Tensor

from lilliput.anatomy.explore import explore
from lilliput.anatomy.model import Anatomy, Block
from lilliput.anatomy.skeleton import Skeleton
from lilliput.anatomy.tables import tables
from lilliput.errors import PlanError, SourceError
from lilliput.model.edit import Edit, bank_of, experts_of, heads_of, router_of, writers_of
from lilliput.model.fitting import changed, differences, fitting, runs, whole_config
from lilliput.model.residual import Change
from lilliput.model.rotated import RotatedModel
from lilliput.model.weights import Model, stretches

if TYPE_CHECKING:
    from lilliput.source import Source

__all__ = ["Edit", "EditedModel", "heads_of", "unedited", "views"]


def spreads(model: Model) -> bool:
    """Whether an edit of the model decides on sizes of its own for each block."""
    return any(isinstance(x, EditedModel) and x.edit.spread for x in views(model))


@final
class EditedModel(Model):
    """`base` without what `edit` leaves out. Raises PlanError where no config of its architecture has such sizes."""

    def __init__(
        self,
        base: Model,
        edit: Edit,
        *,
        skeleton: Skeleton | None = None,
        anatomy: Anatomy | None = None,
        source: Source | None = None,
        updates: Mapping[str, Path] | None = None,
    ) -> None:
        self.base, self.edit, self._updates = base, edit, updates or {}
        self._keep = _kept(base, edit) | _rows_kept(base, edit)
        self._base_name = {new: old for old, new in _renamed(base, edit).items()}
        self._averaged = _averaged(base, edit)
        self._silent = _silent(base, edit)
        expected = {new: self._sliced_shape(old) for new, old in self._base_name.items()}
        self.skeleton = fitting(base, edit, expected) if skeleton is None else skeleton
        if dict(self.skeleton.shapes) != expected:
            raise RuntimeError("an edit of other sizes than those of the model that was planned")
        self.carried, self.copies, self.notes = base.carried, base.copies, base.notes
        self.source = base.source
        if edit.vocabulary is not None:
            self.source = base.source.trimmed(edit.vocabulary) if source is None else source
        self.refs = {name: base.refs[old] for name, old in self._base_name.items() if old in base.refs}
        self.fused = tuple(x for x in self.refs if self._base_name[x] in base.fused)
        self._anatomy = anatomy

    def with_edit(self, edit: Edit) -> EditedModel:
        """The base with another edit, of the same sizes unless it is spread."""
        if self.edit.spread:
            return EditedModel(self.base, edit)
        same = self.source if edit.vocabulary == self.edit.vocabulary else None
        return EditedModel(self.base, edit, skeleton=self.skeleton, anatomy=self._anatomy, source=same)

    def over(self, base: Model) -> EditedModel:
        """The same edit of another base of the same sizes."""
        return EditedModel(
            base, self.edit, skeleton=self.skeleton, anatomy=self._anatomy, source=self.source, updates=self._updates
        )

    def updated(self, files: Mapping[str, Path]) -> EditedModel:
        """The same edit with other weights of what stays: by the base's names, safetensors files that hold them under
        these names, as they are stored and with nothing left of what has left."""
        return EditedModel(
            self.base, self.edit, skeleton=self.skeleton, anatomy=self._anatomy, source=self.source, updates=files
        )

    @property
    def config(self) -> Any:
        return whole_config(self.base.config, self.skeleton.config, self.base.skeleton.config)

    @property
    def raw(self) -> Mapping[str, Any]:
        return changed(self.base.raw, differences(self.base.skeleton.config, self.skeleton.config))

    def anatomy(self) -> Anatomy:
        if self._anatomy is None:
            try:
                found = explore(self.skeleton)
            except SourceError as error:
                raise PlanError(f"a model of the sizes that an edit leaves does not run: {error}") from error
            routed = self.edit.experts or self.edit.top_k is not None
            self._anatomy = runs(found, self.skeleton.config) if routed else found
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

    def averaged(self, canonical: str) -> bool:
        """Whether a tensor is an average of several of the base's."""
        return self._base_name[canonical] in self._averaged

    def read(self, canonical: str) -> Tensor:
        old = self._base_name[canonical]
        if old in self._updates:
            with safe_open(self._updates[old], framework="pt") as file:
                updated: Tensor = file.get_tensor(old)
            return updated
        value = self._scaled(canonical, self._average(old))
        for axis, index in self._keep.get(old, {}).items():
            value = value.index_select(axis, index)
        return torch.zeros_like(value) if old in self._silent else value.contiguous()

    def read_rows(self, canonical: str, start: int, stop: int) -> Tensor:
        rows = self._table_rows(canonical)
        if rows is not None:
            return self._gathered(self._base_name[canonical], rows[start:stop])
        if self._changes(canonical):
            return self.read(canonical)[start:stop].contiguous()
        return self.base.read_rows(self._base_name[canonical], start, stop)

    def spans(self, canonical: str, rows: Tensor) -> Iterator[tuple[int, int]]:
        if self._changes(canonical):
            return stretches(rows, self.shape(canonical)[0])
        return self.base.spans(self._base_name[canonical], rows)

    def stored_name(self, canonical: str) -> str:
        old = self._base_name.get(canonical, canonical)
        name = self.base.stored_name(old)
        for number, block in enumerate(self.edit.blocks):
            new_block, old_block = self.skeleton.block_names[number], self.base.skeleton.block_names[block]
            if not old.startswith(f"{old_block}."):
                continue
            bank = bank_of(self.base.anatomy().blocks[block]) if block in self.edit.experts else None
            if bank is not None and old.startswith(f"{old_block}.{bank}."):
                before, after = (_expert(x, f"{y}.{bank}.") for x, y in ((old, old_block), (canonical, new_block)))
                head, _, tail = name.rpartition(f".{before}.")
                name = f"{head}.{after}.{tail}"
            if number != block:
                words, parts = new_block.rpartition("."), old_block.rpartition(".")
                leaf = words[0].rpartition(".")[2]
                head, _, tail = f".{name}".rpartition(f".{leaf}.{parts[2]}.")
                name = f"{head}.{leaf}.{words[2]}.{tail}".removeprefix(".")
        return name

    def shape(self, canonical: str) -> tuple[int, ...]:
        return self.skeleton.shapes[canonical]

    def dtype(self, canonical: str) -> torch.dtype:
        return self.base.dtype(self._base_name[canonical])

    def parts(self, canonical: str) -> tuple[str, ...]:
        return self.base.parts(self._base_name[canonical])

    def _table_rows(self, canonical: str) -> Tensor | None:
        """The base's rows of a matrix that loses tokens, which are read without the rest of it; None for another."""
        keep = self._keep.get(self._base_name[canonical], {})
        return keep.get(0) if self.edit.vocabulary is not None and len(self.shape(canonical)) == 2 else None

    def _gathered(self, old: str, rows: Tensor) -> Tensor:
        """Rows int64 [n] (ascending) of a tensor of the base."""
        pieces = []
        for first, last in self.base.spans(old, rows):
            inside = rows[(rows >= first) & (rows < last)]
            pieces.append(self.base.read_rows(old, first, last)[inside - first])
        return torch.cat(pieces)

    def _changes(self, canonical: str) -> bool:
        """Whether a tensor is another than the base's."""
        old = self._base_name[canonical]
        return bool(self._keep.get(old)) or any(old in x for x in (self._averaged, self._updates, self._silent))

    def _average(self, old: str) -> Tensor:
        """A tensor of the base with others in it by their shares; where all are equal, it is exactly that one."""
        first = self.base.read(old)
        if old not in self._averaged:
            return first
        exact = first.float()
        total = torch.zeros_like(exact)
        for other, share in self._averaged[old]:
            total.add_(self.base.read(other).float().sub_(exact), alpha=share)
        return exact.add_(total).to(first.dtype)

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
    for number, kept in edit.experts.items():
        for name, along in _by_expert(base, number):
            keep.setdefault(name, {})[along] = torch.tensor(kept, dtype=torch.int64)
    if edit.hidden is not None:
        first = torch.arange(edit.hidden) if edit.residual is None else torch.tensor(edit.residual)
        for name in base.skeleton.shapes:
            change = _change(base, name)
            if change is not None:
                turned = (change.kind == "reader" and not change.transposed) or change.kind == "outside"
                turned = turned or (change.kind == "writer" and change.transposed)
                keep.setdefault(name, {})[int(turned)] = first
    return keep


def _rows_kept(base: Model, edit: Edit) -> dict[str, dict[int, Tensor]]:
    """By the base's name of embedding and head, the rows of the tokens that stay. Raises PlanError for a model whose
    tokens have other tables than these."""
    if edit.vocabulary is None:
        return {}
    keep: dict[str, dict[int, Tensor]] = {}
    rows = torch.tensor(edit.vocabulary, dtype=torch.int64)
    for table in tables(base.skeleton):
        if table.out_features != base.vocabulary or base.source.config is not base.source.text_config:
            raise PlanError(
                f"{type(base.skeleton.model).__name__} reads or writes more than the tokens of its embedding: leave "
                "its vocabulary as it is"
            )
        keep[f"{table.name}.weight"] = {0: rows}
        if table.bias:
            keep[f"{table.name}.bias"] = {0: rows}
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


def _by_expert(base: Model, number: int) -> Iterator[tuple[str, int]]:
    """The tensors of a block that have an entry for each expert along an axis: those of the router and beside it."""
    block, skeleton = base.anatomy().blocks[number], base.skeleton
    router, bank, count = router_of(block), bank_of(block), len(experts_of(block))
    if router is None or bank is None:
        return
    prefix = skeleton.block_names[number]
    weight = f"{prefix}.{router}.weight"
    yield weight, int(block.linear(router).transposed)
    around = router.rpartition(".")[0]
    others = {f"{prefix}.{x.name}.weight" for x in block.linears}
    for name in skeleton.names_of(number):
        inside = name.startswith(f"{prefix}.{around}.") and not name.startswith(f"{prefix}.{bank}.")
        axes = [axis for axis, size in enumerate(skeleton.shapes[name]) if size == count]
        if inside and name not in others and len(axes) == 1:
            yield name, axes[0]


def _silent(base: Model, edit: Edit) -> frozenset[str]:
    """The base's names of the tensors by which silent branches wrote."""
    anatomy = base.anatomy()
    linears = [(anatomy.block_names[n], x) for n, branch in edit.silent for x in writers_of(anatomy.blocks[n], branch)]
    return frozenset(f"{prefix}.{name}.{leaf}" for prefix, name in linears for leaf in ("weight", "bias"))


def _averaged(base: Model, edit: Edit) -> dict[str, tuple[tuple[str, float], ...]]:
    """By the base's name of a tensor that becomes an average, the others in it with their shares."""
    found: dict[str, tuple[tuple[str, float], ...]] = {}
    for number, groups in edit.merged.items():
        block, prefix = base.anatomy().blocks[number], base.skeleton.block_names[number]
        start = f"{prefix}.{bank_of(block)}."
        for first, group in zip(edit.experts[number], groups, strict=True):
            rest = [(expert, share) for expert, share in group if expert != first and share > 0.0]
            if not rest:
                continue
            for name in base.skeleton.names_of(number):
                if name.startswith(f"{start}{first}."):
                    leaf = name.removeprefix(f"{start}{first}.")
                    found[name] = tuple((f"{start}{expert}.{leaf}", share) for expert, share in rest)
    return found


def _expert(name: str, start: str) -> str:
    """The number of the expert in a tensor's name, after the name of what holds all of them."""
    return name.removeprefix(start).partition(".")[0]


def _renamed(base: Model, edit: Edit) -> dict[str, str]:
    """The new canonical name of every tensor of the base that stays."""
    skeleton = base.skeleton
    number = {block: n for n, block in enumerate(edit.blocks)}
    inside = {name: block for block in range(len(skeleton.block_names)) for name in skeleton.names_of(block)}
    banks = {block: bank_of(base.anatomy().blocks[block]) for block in edit.experts}
    names: dict[str, str] = {}
    for name in skeleton.shapes:
        block = inside.get(name)
        if block is None:
            names[name] = name
            continue
        if block not in number:
            continue
        prefix = skeleton.block_names[block]
        rest = name.removeprefix(prefix)
        start = f".{banks.get(block)}."
        if rest.startswith(start):
            expert, _, leaf = rest.removeprefix(start).partition(".")
            if int(expert) not in edit.experts[block]:
                continue
            rest = f"{start}{edit.experts[block].index(int(expert))}.{leaf}"
        names[name] = skeleton.block_names[number[block]] + rest
    return names


def views(model: Model) -> Iterator[Model]:
    """A model and, one after the other, what it rests on: edited and turned models, and at last the stored one."""
    while isinstance(model, EditedModel | RotatedModel):
        yield model
        model = model.base
    yield model


def unedited(model: Model) -> Model:
    """The model before all edits and rotations but that of its vocabulary, whose tokens both read."""
    *_, stored = views(model)
    return next((x for x in views(model) if _rereads(x)), stored)


def vocabulary_of(model: Model) -> tuple[int, ...] | None:
    """The tokens of the stored model that stay; None where nothing decides about them."""
    return next((x.edit.vocabulary for x in views(model) if isinstance(x, EditedModel) and _rereads(x)), None)


def fewer_tokens(model: Model) -> str | None:
    """How many tokens stay, in words; None where nothing decides about them."""
    *_, stored = views(model)
    kept = vocabulary_of(model)
    if kept is None:
        return None
    return f"{len(kept):,} of {stored.vocabulary:,} tokens stay: text that needs others takes more tokens"


def _rereads(model: Model) -> bool:
    """Whether a view has other tokens than what it rests on."""
    return isinstance(model, EditedModel) and model.edit.vocabulary is not None
