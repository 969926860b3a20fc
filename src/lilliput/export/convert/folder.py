"""A container that is a folder: its weights, written one linear at a time, and all that lies beside them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lilliput.anatomy.widths import differ
from lilliput.errors import PlanError
from lilliput.export.card import Card, read_licence
from lilliput.export.convert import Converted, Converter
from lilliput.export.convert.coded import outcomes
from lilliput.export.folder import (
    SHARD,
    model_config,
    safetensors_bytes,
    safetensors_header,
    write_index,
    write_side_files,
)
from lilliput.export.outcome import Outcome
from lilliput.export.provenance import LinearRow, Provenance, TensorRow, versions
from lilliput.export.provenance import read as read_provenance
from lilliput.model.stored import behaviours_of, caches_of
from lilliput.source.open import open_source
from lilliput.source.reader import row_chunks
from lilliput.source.source import Source

IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers of old checkpoints
_LEFT = ".part"


@dataclass(frozen=True)
class Item:
    """Tensors that are made together: dtype and shape by name, and `make`, which yields each as consecutive rows, or
    whole as one piece."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Contents:
    """What a folder is to hold. config: its config.json; layout and use: what the card says of it; metadata: of the
    weight files."""

    items: Sequence[Item]
    config: Mapping[str, Any]
    layout: str
    use: Sequence[str]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


def vacant(out: Path) -> None:
    """Raises PlanError where nothing new can be written to `out`."""
    if out.exists() or out.is_symlink():
        raise PlanError(f"{out} exists already: remove it or give another --out")
    if not out.absolute().parent.is_dir():
        raise PlanError(f"the folder {out.absolute().parent} does not exist: make it first")


def runs_plainly(source: Source, container: str) -> None:
    """Raises PlanError for a folder whose config says how its model runs, which no container can."""
    if behaviours_of(source):
        raise PlanError(
            f"{source.model} leaves tokens or channels out while it runs, which a folder as {container} cannot say: "
            "compress the model without token-pruning and dynamic-pruning, and convert that"
        )
    if source.inputs:
        raise PlanError(
            f"{source.model} rounds the inputs of its linears, which a folder as {container} made of it does not say: "
            "compress the model with export 'compressed-tensors', or without the step for inputs, and convert that"
        )
    if caches_of(source):
        raise PlanError(
            f"{source.model} stores keys and values compressed, which a folder as {container} cannot say: compress the "
            "model without the step for its cache, and convert that"
        )


def admitted(folder: Path, out: Path, converter: Converter) -> tuple[Source, tuple[Outcome, ...]]:
    """The folder to be converted, and its linears that are no plain tensors.

    Raises PlanError for what the container has no room for, and where nothing can be written to `out`, SourceError
    where there is no model.
    """
    vacant(out)
    source = open_source(str(folder))
    found = outcomes(source)
    beside = source.adapters()
    if beside:
        raise PlanError(
            f"{folder} has an adapter in {beside[0]}/, which a folder as {converter.name} would leave out: put it into "
            f"the weights with `lilliput merge` first, or move {beside[0]}/ away"
        )
    runs_plainly(source, converter.name)
    reason = differ(source.text_config) or converter.refuse(found, source.config)
    if reason is not None:
        raise PlanError(f"{folder} cannot be written as {converter.name}: {reason}")
    return source, found


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which gets its name where all went well, and goes where not."""
    place = out.absolute().with_name(f".{out.name}{_LEFT}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
        place.rename(out)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def config_of(source: Source, quantization: Mapping[str, Any] | None, dtype: torch.dtype) -> dict[str, Any]:
    """The folder's config.json with another entry for the quantization, and the dtype of its plain tensors."""
    return model_config(
        source.config,
        quantization=quantization,
        dtype=dtype,
        tied=bool(source.text_config.tie_word_embeddings),
        raw=source.raw,
    )


def delivered(out: Path, to: str, source: Source, coded: Sequence[Outcome], contents: Contents) -> Converted:
    """Write a folder of these contents to `out`, and the answer for it."""
    with staged(out) as place:
        types = write(place, source, coded, contents)
    return converted(out, to, types, contents.notes)


def converted(out: Path, to: str, types: Mapping[str, int], notes: tuple[str, ...]) -> Converted:
    """The answer, once the folder has its name."""
    size = sum(x.stat().st_size for x in out.rglob("*") if x.is_file())
    return Converted(out, to, size, dict(types), notes=notes)


def carried(source: Source, coded: Iterable[Outcome]) -> Iterator[Item]:
    """Every tensor of a folder that is not among these linears, as its values."""
    left_out = {f"{x.stored}.weight" for x in coded}
    for name, stored in source.stored.items():
        if name not in left_out and not name.endswith(IGNORED):
            yield Item({name: (stored.dtype, stored.shape)}, _reading(source, name))


def _reading(source: Source, name: str) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    def pieces() -> Iterator[tuple[str, Tensor]]:
        stored = source.stored[name]
        if len(stored.shape) != 2 or not prod(stored.shape):
            yield name, source.read(name)
            return
        for rows in row_chunks(stored.shape, stored.shape[1] * stored.dtype.itemsize):
            yield name, source.read(name, rows)

    return pieces


def write(folder: Path, source: Source, coded: Sequence[Outcome], contents: Contents) -> Counter[str]:
    """Write a whole model's folder into the empty `folder`. Returns bytes by dtype."""
    shards = _shards(contents.items, contents.metadata)
    rows: list[TensorRow] = []
    types = Counter[str]()
    for file, items in shards.items():
        rows += write_weights(folder / file, items, contents.metadata)
    for x in rows:
        types[x.dtype] += nbytes(x)
    if len(shards) > 1:
        write_index(folder, {f: [n for i in items for n in i.tensors] for f, items in shards.items()}, types.total())
    provenance = _provenance(source, coded, contents, tuple(rows))
    card = Card(
        title=f"{provenance.model.rsplit('/', 1)[-1]}-{contents.layout}",
        base_model=provenance.model,
        layout=contents.layout,
        recipe=json.dumps(provenance.recipe, indent=1, ensure_ascii=False),
        licence=read_licence(source.folder),
        notes=provenance.notes,
        use=tuple(contents.use),
    )
    write_side_files(
        folder, source_side_files=source.side_files(), config=contents.config, provenance=provenance, card=card
    )
    return types


def write_weights(path: Path, items: Sequence[Item], metadata: Mapping[str, str]) -> list[TensorRow]:
    """One safetensors file, as the library would write it, a tensor at a time, each to its place."""
    layout = {name: x for item in items for name, x in item.tensors.items()}
    header, order = safetensors_header(layout, metadata)
    place, start = {}, len(header)
    for name in order:
        place[name] = start
        start += _size(layout[name])
    rows = []
    with path.open("wb") as file:
        file.truncate(start)
        file.write(header)
        for item in items:
            done = {name: (0, hashlib.sha256()) for name in item.tensors}
            for name, piece in item.make():
                dtype, shape = layout[name]
                if piece.dtype != dtype or piece.shape[1:] != shape[1:]:
                    raise RuntimeError(f"{name} was laid out as {dtype} {shape}; it is {piece.dtype} {piece.shape}")
                raw = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
                at, digest = done[name]
                file.seek(place[name] + at)
                file.write(raw)
                digest.update(raw)
                done[name] = (at + len(raw), digest)
            for name, (at, digest) in done.items():
                dtype, shape = layout[name]
                if at != _size(layout[name]):
                    raise RuntimeError(f"{name} has {_size(layout[name])} bytes and was written with {at}")
                kind = str(dtype).removeprefix("torch.")
                rows.append(TensorRow(name, path.name, kind, tuple(shape), digest.hexdigest()))
    return rows


def nbytes(row: TensorRow) -> int:
    """Bytes of a tensor."""
    return prod(row.shape) * int(getattr(torch, row.dtype).itemsize)


def _size(held: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return prod(held[1]) * held[0].itemsize


def _shards(items: Sequence[Item], metadata: Mapping[str, str]) -> dict[str, list[Item]]:
    """The items of each file, up to `SHARD` bytes or one item a file."""
    files: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        share = safetensors_bytes(item.tensors, metadata)
        if files[-1] and filled + share > SHARD:
            files.append([])
            filled = 0
        files[-1].append(item)
        filled += share
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{n + 1:05d}-of-{len(files):05d}.safetensors": x for n, x in enumerate(files)}


def _provenance(
    source: Source, coded: Sequence[Outcome], contents: Contents, tensors: tuple[TensorRow, ...]
) -> Provenance:
    """That of the folder, with what is stored now; of a folder without one, what can be told."""
    before = read_provenance(source.folder)
    if before is None:
        linears = tuple(
            LinearRow(x.name, x.stored, x.scheme.describe(), x.scheme.size_bits(x.out_features, x.in_features)
                      / max(x.out_features * x.in_features, 1))
            for x in coded
        )  # fmt: skip
        before = Provenance(
            source.name, source.fingerprint(), "", {}, "", None, None, versions(), linears=linears
        )  # fmt: skip
    kept = {key: value for key, value in before.measured.items() if key not in ("bytes", "engine")}
    return replace(
        before, layout=contents.layout, notes=contents.notes, measured=kept, tensors=tensors, versions=versions()
    )
