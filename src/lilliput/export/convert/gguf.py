"""One GGUF file from a finished folder: rows of blocks are copied as they are, so the file decodes to the same values.

Written by the `gguf` package, tensor after tensor and few rows at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from torch import Tensor

from lilliput.anatomy.widths import differ
from lilliput.errors import PlanError
from lilliput.export.convert import Converted, Wanted, gguf_blocks, gguf_check, gguf_model, gguf_vocab
from lilliput.export.convert.folder import IGNORED, runs_plainly, vacant
from lilliput.export.outcome import Outcome
from lilliput.export.provenance import read as read_provenance
from lilliput.parts.linear import LinearSpec
from lilliput.parts.part import below
from lilliput.source.open import open_source
from lilliput.source.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PIECE = 16 << 20  # bytes of a tensor in memory at a time
_PLAIN = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: name, shape [out, in], type, and its rows [a, b) as bytes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    rows: Callable[[int, int], Tensor]
    whole: bool = False  # rows come in another order, so that all are read at once

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size if len(self.shape) > 1 else size

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def pieces(self) -> Iterator[Tensor]:
        step = self.shape[0] if self.whole else max(1, _PIECE // max(self.row_bytes, 1))
        for a in range(0, self.shape[0], step):
            yield self.rows(a, min(a + step, self.shape[0]))


class GgufConverter:
    """Writes GGUF files for llama.cpp and what is built on it."""

    name = "gguf"

    def refuse(self, outcomes: Sequence[Outcome], config: PretrainedConfig) -> str | None:
        reason = gguf_model.refuse(config.get_text_config(decoder=True))
        if reason is not None:
            return reason
        for x in outcomes:
            if x.scheme.parts and gguf_blocks.type_of(x.scheme, x.out_features, x.in_features) is None:
                return _misfit(
                    x.name, x.scheme.describe(), LinearSpec(x.name, x.stored, x.out_features, x.in_features, x.scheme)
                )
        return None

    def convert(self, folder: Path, out: Path, wanted: Wanted) -> Converted:
        wanted.only(self.name, "like")
        vacant(out)
        source = open_source(str(folder))
        runs_plainly(source, "gguf")
        config = source.text_config
        reason = differ(config) or gguf_model.refuse(config)
        if reason is not None:
            raise PlanError(f"{folder} cannot become a GGUF file: {reason}")
        tensors = tuple(_tensors(source))
        types = Counter[str]()
        for x in tensors:
            types[x.kind.name] += x.nbytes
        provenance = read_provenance(source.folder)
        name = source.name if provenance is None else provenance.model
        writer = gguf_vocab.described(source, name, wanted.like, _file_type(types))
        for x in tensors:
            writer.add_tensor_info(x.name, x.shape, np.dtype(np.float32), x.nbytes, raw_dtype=x.kind)
        part = out.with_name(out.name + ".part")
        try:
            _write(writer, part, tensors)
            seen = gguf_check.look(part, folder)
            gguf_check.refuse(seen, out)
            part.rename(out)
        finally:
            part.unlink(missing_ok=True)
        notes = (*gguf_model.notes(config), *seen.notes)
        return Converted(out, self.name, out.stat().st_size, dict(types), seen.detail, notes)


def _write(writer: GGUFWriter, path: Path, tensors: Sequence[_Tensor]) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if writer.fout is None:
        raise RuntimeError("the writer of the gguf package has opened no file")
    (file,) = writer.fout
    try:
        for x in tensors:
            writer.write_padding(file, file.tell())
            for piece in x.pieces():
                file.write(piece.contiguous().view(torch.uint8).reshape(-1).numpy().data)
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _tensors(source: Source) -> Iterator[_Tensor]:
    """All tensors of the file. Raises PlanError for one that a GGUF file has no place or no type for."""
    config = source.text_config
    known = gguf_model.KNOWN[config.model_type]
    names = get_tensor_name_map(known.kind, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    factors = gguf_model.frequency_factors(config)
    if factors is not None:
        yield _Tensor("rope_freqs.weight", (len(factors),), GGMLQuantizationType.F32, lambda a, b: factors[a:b])
    for stored in source.stored:
        if stored.endswith(IGNORED) or (tied and stored == "lm_head.weight"):
            continue
        name = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise PlanError(f"tensor {stored} has no place in a GGUF file of a {known.name} model: keep the folder")
        spec = source.linear(stored)
        yield _plain(source, stored, name) if spec is None else _packed(source, stored, name, spec)


def _plain(source: Source, stored: str, name: str) -> _Tensor:
    entry, config = source.stored[stored], source.text_config
    if source.quantization is not None and len(source.parts(stored)) > 1:
        raise PlanError(
            f"tensor {stored} is packed for another engine ({source.quantization}): compress again with a recipe of "
            "ggml's types, such as q4_k"
        )
    if len(entry.shape) == 1:
        order = gguf_model.row_order(config, name, entry.shape[0])
        shift = 1.0 if gguf_model.KNOWN[config.model_type].shifted and "norm" in name else 0.0

        def vector(a: int, b: int) -> Tensor:
            value = source.read(stored).float() + shift
            return (value if order is None else value[order])[a:b]

        return _Tensor(name, entry.shape, GGMLQuantizationType.F32, vector)
    if entry.dtype not in _PLAIN:
        raise PlanError(f"tensor {stored} has type {entry.dtype}, which GGUF does not hold: make it float32 first")
    turned = config.model_type == "gpt2" and name.startswith("blk.")  # Conv1D
    shape = entry.shape[::-1] if turned else entry.shape
    rows = gguf_model.row_order(config, name, shape[0])

    def matrix(a: int, b: int) -> Tensor:
        if not turned and rows is None:
            return source.read(stored, (a, b))
        value = source.read(stored)
        value = value.T if turned else value
        return (value if rows is None else value[rows])[a:b]

    return _Tensor(name, shape, _PLAIN[entry.dtype], matrix, turned or rows is not None)


def _packed(source: Source, stored: str, name: str, spec: LinearSpec) -> _Tensor:
    count, width = spec.out_features, spec.in_features
    kind = gguf_blocks.type_of(spec.scheme, count, width)
    if kind is None:
        raise PlanError(_misfit(stored, spec.scheme.describe(), spec))
    order = gguf_model.row_order(source.text_config, name, count)
    direct = set(spec.describe()) == {spec.payload}

    def rows(a: int, b: int) -> Tensor:
        if direct and order is None:
            size = source.part_bytes(spec.payload) // count
            return source.part(spec.payload, (a * size, b * size)).view(b - a, size)
        get = below(source.part, spec.payload)
        whole = gguf_blocks.blocks(spec.scheme, stored, get, count, width, 0, count)
        return (whole if order is None else whole[order])[a:b]

    return _Tensor(name, (count, width), GGMLQuantizationType[kind.upper()], rows, not direct or order is not None)


def _misfit(name: str, said: str, spec: LinearSpec) -> str:
    close = gguf_blocks.nearest_type(spec.scheme, spec.out_features, spec.in_features)
    return f"{name} is '{said}', which no type of GGUF holds: compress again with format {close} for it"


def _file_type(types: Mapping[str, int]) -> LlamaFileType:
    """What most bytes are, as llama.cpp names it."""
    named = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M",
             "MXFP4": "MOSTLY_MXFP4_MOE"}  # fmt: skip
    most = max(types, key=lambda x: types[x])
    return LlamaFileType[named.get(most, f"MOSTLY_{most}")]


CONVERTER = GgufConverter()
