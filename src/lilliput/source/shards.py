"""Safetensors files of one folder, one tensor at a time.

The safetensors library opens each file once, in its unmapped mode, and checks the whole header (length, overlaps,
holes, file size). A valid file has no holes, so the tensors' offsets follow from their order and sizes; the bytes are
then read straight into the tensor. An open map, the library's default, would count as memory page by page.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lilliput.errors import SourceError
from lilliput.source.reader import Entry, pread, row_chunks
from lilliput.units import few

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def pickles(folder: Path) -> list[str]:
    """Names of the files in the folder that only unpickling could read."""
    return sorted(x.name for x in folder.iterdir() if x.suffix in PICKLES and x.name != "training_args.bin")


def refuse_pickles(names: list[str], folder: Path) -> SourceError:
    """The one message for weights that are pickles."""
    return SourceError(
        f"{folder} holds its weights as pickles ({few(names)}); a pickle "
        "can run any code when it is opened, so none is opened here. Convert it where you trust it: "
        f"`AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW', safe_serialization=True)`."
    )


def choose(folder: Path, named: str | None = None) -> Path:
    """The file of weights, or the index of several, that transformers takes.

    The one that the config names as `transformers_weights` (`named`), else model.safetensors, else its index; else the
    only safetensors file. Raises SourceError: no weights, pickles only, several files and nothing to say which, a named
    file that the folder lacks.
    """
    config = folder / "config.json"
    if named is not None:
        if Path(named).name != named or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise SourceError(
                f"{config} names '{named}' as transformers_weights, which is neither a *.safetensors file of its "
                "folder nor the index of several: correct the entry, or remove it."
            )
        if not (folder / named).is_file():
            raise SourceError(
                f"{config} names '{named}' as transformers_weights, and the folder lacks it. Copy or download the "
                "file, or remove the entry."
            )
        return folder / named
    for name in (WHOLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if names := pickles(folder):
            raise refuse_pickles(names, folder)
        raise SourceError(f"{folder} contains no weights: there is no *.safetensors and no *.gguf file in it.")
    if files[0].name.startswith("model-0") and "-of-" in files[0].name:
        raise SourceError(f"{folder} has shards but no {INDEX}, which names them all. Copy or download it again.")
    if len(files) > 1:
        raise SourceError(
            f"{folder} has {len(files)} safetensors files ({files[0].name}, {files[1].name}, ...) and neither "
            f"{WHOLE} nor {INDEX} to say which are the model. Keep the one that is, as {WHOLE}."
        )
    return files[0]


def named_in(index: Path) -> dict[str, Path]:
    """Tensor name -> shard, as an index says. Raises SourceError: it is broken, or names a file of another folder."""
    try:
        named = json.loads(index.read_text())["weight_map"]
        pairs = {str(name): index.parent / str(file) for name, file in named.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise SourceError(f"{index} is not an index of shards ({error}). Copy or download it again.") from error
    if stray := sorted(str(x) for x in set(named.values()) if Path(str(x)).name != str(x)):
        raise SourceError(f"{index} names a file outside its folder: {stray[0]}. A shard's name has no directories.")
    return pairs


def files_of(chosen: Path) -> dict[str, Path | None]:
    """Tensor name -> file as the index says, or {"": the file} for one that is no index.

    Raises SourceError: a broken index, a shard that it names and the folder lacks.
    """
    if chosen.suffix != ".json":
        return {"": chosen}
    pairs = named_in(chosen)
    missing = sorted({x.name for x in pairs.values() if not x.is_file()})
    if missing:
        raise SourceError(
            f"{chosen.parent} lacks {len(missing)} of {len(set(pairs.values()))} shards: {', '.join(missing[:4])}. "
            "Copy or download the folder again."
        )
    return dict(pairs)


def header_of(file: Path) -> dict[str, tuple[Entry, int]]:
    """Entry and absolute offset of every tensor of a file, the header checked by the library."""
    try:
        with safe_open(file, framework="pt", backend="pread") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            layout = [(name, tuple(x.get_shape()), str(x.get_dtype())) for name, x in slices]
        with file.open("rb") as plain:
            offset = 8 + int(struct.unpack("<Q", plain.read(8))[0])
    except (SafetensorError, OSError) as error:
        raise SourceError(
            f"{file} is no whole safetensors file: {error}. It is truncated or damaged; copy or download it again."
        ) from error
    out = {}
    for name, shape, kind in layout:
        if kind not in DTYPES:
            raise SourceError(
                f"{file}: tensor {name} has dtype {kind}, which cannot be read. Convert it to BF16 first."
            )
        nbytes = prod(shape) * DTYPES[kind].itemsize
        out[name] = (Entry(shape, DTYPES[kind], nbytes, file), offset)
        offset += nbytes
    return out


class Shards:
    """Reader of a folder's safetensors files, sharded or not; `named`: see `choose`, whose answer is `chosen`."""

    def __init__(self, folder: Path, named: str | None = None) -> None:
        self.chosen = choose(folder, named)
        pairs = files_of(self.chosen)
        self.files = tuple(sorted({x for x in pairs.values() if x is not None}))
        headers = {file: header_of(file) for file in self.files}
        self._offsets: dict[str, int] = {}
        self.entries: dict[str, Entry] = {}
        for file, header in headers.items():
            for name, (entry, offset) in header.items():
                if "" in pairs or pairs.get(name) == file:
                    self.entries[name], self._offsets[name] = entry, offset
        if absent := sorted(set(pairs) - set(self.entries) - {""}):
            raise SourceError(
                f"{pairs[absent[0]]} lacks tensor {absent[0]}, which the index promises there"
                f"{f' (and {len(absent) - 1} more)' if len(absent) > 1 else ''}. Copy or download the folder again."
            )

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor in its dtype, or its rows [start, stop); read from disk straight into its memory."""
        entry = self.entries[name]
        shape, offset = entry.shape, self._offsets[name]
        if rows is not None:
            offset += rows[0] * (entry.nbytes // shape[0])
            shape = (rows[1] - rows[0], *shape[1:])
        out = torch.empty(shape, dtype=entry.dtype)
        if out.numel():
            pread(entry.file, offset, out.reshape(-1).view(torch.uint8).numpy())
        return out

    def chunks(self, name: str) -> Iterator[tuple[NDArray[np.uint8], Tensor]]:
        entry = self.entries[name]
        if not entry.shape or not prod(entry.shape):
            whole = self.read(name)
            yield whole.reshape(-1).view(torch.uint8).numpy(), whole
            return
        for rows in row_chunks(entry.shape, entry.nbytes // entry.shape[0]):
            part = self.read(name, rows)
            yield part.reshape(-1).view(torch.uint8).numpy(), part
