"""A source bound to its skeleton: tensors by the names of the module tree, read from wherever the files have them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from lilliput.anatomy.explore import explore
from lilliput.anatomy.model import Anatomy
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import SourceError
from lilliput.model.weights import Model, stretches
from lilliput.runtime import adapter as adapters
from lilliput.runtime import behaviours, caches, inputs
from lilliput.source import Source, Stored, open_source
from lilliput.source.names import Names, Ref, bind, single_name
from lilliput.units import few

__all__ = ["Model", "Ref", "StoredModel", "open_model"]

ROWS = 1 << 12  # rows of two embeddings compared at a time
SPARSE = 8  # rows between two wanted ones that are not worth a read of their own


@final
class StoredModel(Model):
    """A model as its files hold it. Made by `open_model`."""

    def __init__(self, source: Source, skeleton: Skeleton, names: Names, notes: tuple[str, ...] = ()) -> None:
        self.source = source
        self.skeleton = skeleton
        self.refs = {x: names.refs[x] for x in skeleton.shapes}
        self.notes = source.notes + tuple(skeleton.notes) + notes
        self._prefix = names.prefix
        self._head = _head_name(skeleton)
        head = names.refs.get(self._head)
        used = {x.stored for x in self.refs.values()}
        self.copies = (head.stored,) if skeleton.tied and head and head.stored not in used else ()
        self.carried = tuple(x for x in source.stored if x not in used and x not in self.copies)
        self._anatomy: Anatomy | None = None
        parts = [x for x, ref in self.refs.items() if ref.index is not None]
        self.fused = tuple(x for x in parts if single_name(x, skeleton.model) is None)
        if self.fused:
            self.notes += (
                f"{type(skeleton.model).__name__} loads experts only as one 3-D tensor "
                f"({self.refs[self.fused[0]].stored}): single experts can be written in the native format alone",
            )

    def read(self, canonical: str) -> Tensor:
        """A tensor by canonical name: contiguous, on the CPU, in the dtype of the files."""
        ref = self._ref(canonical)
        if ref.index is None:
            value = self.source.read(ref.stored, ref.rows)
        else:
            value = self.source.read(ref.stored, (ref.index, ref.index + 1))[0]
            value = value if ref.rows is None else value[ref.rows[0] : ref.rows[1]].clone()
        return (value.T if ref.transposed else value).contiguous()

    def read_rows(self, canonical: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor that is stored whole; contiguous, on the CPU, in the dtype of the files."""
        ref = self._ref(canonical)
        if ref.index is not None or ref.rows is not None or ref.transposed:
            return self.read(canonical)[start:stop].contiguous()
        return self.source.read(ref.stored, (start, stop))

    def spans(self, canonical: str, rows: Tensor) -> Iterator[tuple[int, int]]:
        """What to read, [start, stop) at a time, to see the rows int64 [n] (ascending, each once) of a tensor.

        At most `TABLE_ROWS` at a time; where few rows of a stretch are wanted, hardly more than those.
        """
        ref = self._ref(canonical)
        if ref.transposed or len(self.source.parts(ref.stored)) > 1:
            yield from stretches(rows, self.shape(canonical)[0])
            return
        for first, last in stretches(rows, self.shape(canonical)[0]):
            in_stretch = rows[(rows >= first) & (rows < last)]
            if len(in_stretch) * SPARSE > last - first:
                yield first, last
                continue
            ends = (in_stretch.diff() > SPARSE).nonzero()[:, 0]
            for group in in_stretch.tensor_split(ends + 1):
                yield int(group[0]), int(group[-1]) + 1

    def stored_name(self, canonical: str) -> str:
        """Name under which to write a tensor: its own in the files.

        For a part of a fused tensor it is a name under which transformers loads the part by itself (see `fused`), and
        for a head that was tied and no longer is, the head's name beside the embedding.
        """
        if canonical == self._head and canonical not in self.refs:
            base = _base(self.skeleton)
            outer = self._prefix.removesuffix(base) if base and f".{self._prefix}".endswith(f".{base}") else ""
            return self.copies[0] if self.copies else outer + canonical
        ref = self._ref(canonical)
        if ref.index is None and ref.rows is None:
            return ref.stored
        return self._aligned(single_name(canonical, self.skeleton.model) or canonical)

    def shape(self, canonical: str) -> tuple[int, ...]:
        """Shape of a canonical tensor."""
        return self._ref(canonical).shape(self.source.stored[self._ref(canonical).stored].shape)

    def dtype(self, canonical: str) -> torch.dtype:
        """Dtype that `read` returns for a canonical tensor."""
        return self.source.stored[self._ref(canonical).stored].dtype

    def parts(self, canonical: str) -> tuple[str, ...]:
        """Names in the files of what a canonical tensor is stored as, or is a part of."""
        return self.source.parts(self._ref(canonical).stored)

    def anatomy(self) -> Anatomy:
        """What the model is made of; found once."""
        if self._anatomy is None:
            self._anatomy = explore(self.skeleton)
        return self._anatomy

    def _ref(self, canonical: str) -> Ref:
        if canonical not in self.refs:
            raise SourceError(f"{self.source.model} has no tensor named {canonical}.")
        return self.refs[canonical]

    def _aligned(self, canonical: str) -> str:
        base = _base(self.skeleton)
        return self._prefix + canonical.removeprefix(base) if base and canonical.startswith(base) else canonical


def open_model(
    model: str | Path | Model,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Model:
    """Open a checkpoint and bind its tensors to the module tree that runs them; only tied weights are read, to compare.

    dtype, device: what the skeleton computes in. A model that is open already comes back as it is, with the dtype and
    the device that it was opened with, so that callers who measure several things open it once. Raises SourceError when
    a tensor that the model needs is missing or has another shape than the config asks for.
    """
    if not isinstance(model, str | Path):
        return model
    source = open_source(str(model), trust_remote_code=trust_remote_code)
    notes: tuple[str, ...] = ()
    config: Any = source.text_config
    skeleton = Skeleton(config, dtype=dtype, device=device)
    names = _bind(source, skeleton)
    if source.config is source.text_config and names.prefix not in ("", _base(skeleton)) and not source.from_gguf:
        # A language model inside something of the user's own: transformers would not find it under these names.
        source = open_source(str(model), trust_remote_code=trust_remote_code, prefix=(names.prefix, _base(skeleton)))
        names = _bind(source, skeleton)
    embedding, head = skeleton.head if skeleton.tied else "", _head_name(skeleton)
    if skeleton.tied and head in names.refs and embedding not in names.refs:
        names = Names({**names.refs, embedding: names.refs[head]}, names.prefix, names.strange)
    elif skeleton.tied and head in names.refs and not _equal(source, names.refs[head], names.refs[embedding]):
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
        skeleton = Skeleton(config, dtype=dtype, device=device)
        names = _bind(source, skeleton)
        notes = (f"the config ties {head} to {embedding}, but both are stored and differ: they are kept separate",)
    elif not skeleton.tied and head not in names.refs and getattr(source.config, "tie_word_embeddings", False):
        config = copy.deepcopy(config)
        config.tie_word_embeddings = True
        skeleton = Skeleton(config, dtype=dtype, device=device)
        names = _bind(source, skeleton)
    _check(source, skeleton, names)
    if entries := behaviours_of(source):
        behaviours.install(skeleton.model, entries, source.read).strict = True
    if entries := caches_of(source):
        caches.install(skeleton.model, entries, source.read)
    opened = StoredModel(source, skeleton, names, notes)
    _round_inputs(opened)
    return opened


def open_adapted(
    model: str | Path, adapter: Path | None, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Model:
    """Open a folder whose linears compute with an adapter, which stays in memory; None: with none.

    Weights are read as the folder has them. Raises PlanError for prefixes and prompts and where no adapter is, and
    SourceError for an adapter of another model.
    """
    opened = open_model(model, dtype=dtype, device=device)
    if adapter is not None:
        adapters.attach(opened.skeleton.model, adapter, device)
    return opened


def _round_inputs(model: StoredModel) -> None:
    """Let the linears of the skeleton round their inputs as the folder says. Raises SourceError for one that is part of
    a tensor of several."""
    modules = {ref.stored: name for name, ref in model.refs.items() if ref.index is None and ref.rows is None}
    for stored, rounding in model.source.inputs.items():
        name = modules.get(f"{stored}.weight")
        if name is None:
            raise SourceError(f"{model.source.model} rounds the inputs of {stored}, which is no linear of the model")
        inputs.attach(model.skeleton.model.get_submodule(name.removesuffix(".weight")), rounding)


def behaviours_of(source: Source) -> list[dict[str, Any]]:
    """What the folder's config says its model leaves out while it runs."""
    entry = source.raw.get("quantization_config") if source.quantization == "lilliput" else None
    return list(entry.get("behaviours") or ()) if isinstance(entry, dict) else []


def caches_of(source: Source) -> list[dict[str, Any]]:
    """How the folder's config says its model stores keys and values."""
    return [dict(x) for x in source.caches]


def served_dtype(model: Model) -> torch.dtype:
    """The dtype that transformers' dtype="auto" loads plain tensors in: the config's, else that of the embedding."""
    declared = getattr(model.source.text_config, "dtype", None)
    return declared if isinstance(declared, torch.dtype) else model.dtype(model.skeleton.embeddings[0])


def _bind(source: Source, skeleton: Skeleton) -> Names:
    stored = {name: x.shape for name, x in source.stored.items()}
    return bind(stored, [*skeleton.shapes, _head_name(skeleton)], skeleton.model)


def _base(skeleton: Skeleton) -> str:
    prefix = str(getattr(skeleton.model, "base_model_prefix", ""))
    return f"{prefix}." if prefix else ""


def _head_name(skeleton: Skeleton) -> str:
    """The head's own tensor name, also where it is tied to the embedding."""
    model: nn.Module = skeleton.model
    return next(f"{name}.weight" for name, x in model.named_modules() if x is skeleton.head_module)


def _equal(source: Source, a: Ref, b: Ref) -> bool:
    """Whether two stored tensors hold the same numbers; read a few rows at a time."""
    if a == b:
        return True
    first, second = source.stored[a.stored], source.stored[b.stored]
    if first.shape != second.shape:
        return False
    ranges = ((x, min(first.shape[0], x + ROWS)) for x in range(0, first.shape[0], ROWS))
    return all(torch.equal(source.read(a.stored, x), source.read(b.stored, x)) for x in ranges)


def _check(source: Source, skeleton: Skeleton, names: Names) -> None:
    """Raises SourceError unless every tensor of the module tree is stored with its shape."""
    missing = [x for x in skeleton.shapes if x not in names.refs]
    if missing:
        odd = next(iter(names.strange.items()), None)
        why = f" {odd[0]} would need the conversion {odd[1]}, which is not supported here." if odd else ""
        raise SourceError(
            f"{source.model} lacks {len(missing)} of the {len(skeleton.shapes)} tensors that its config asks for: "
            f"{few(missing)}.{why} Check that config.json belongs to "
            "these files and that none of them is missing."
        )
    for name, shape in skeleton.shapes.items():
        ref = names.refs[name]
        stored: Stored = source.stored[ref.stored]
        if ref.shape(stored.shape) != shape:
            raise SourceError(
                f"{ref.stored} in {source.file_of(ref.stored)} has shape {list(stored.shape)}, but the config asks for "
                f"{list(shape)} as {name}. config.json does not belong to these files: copy both from one place."
            )
