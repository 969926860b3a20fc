"""The exact size of a GGUF file before any weight of it exists."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, get_tensor_name_map

from lilliput.errors import PlanError
from lilliput.export.convert import gguf_blocks, gguf_model, gguf_vocab
from lilliput.export.outcome import Outcome
from lilliput.source.source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ALIGNED = 32  # bytes at which tensors begin
Shape = tuple[torch.dtype, tuple[int, ...]]


def data_bytes(config: PretrainedConfig, plain: Mapping[str, Shape], outcomes: Sequence[Outcome]) -> int:
    """Bytes of all tensors with the gaps between them.

    plain: dtype and shape of every tensor that is no compressed linear, by stored name; outcomes: the linears that are.
    Raises PlanError for a linear that no type holds.
    """
    return sum(-(-size // _ALIGNED) * _ALIGNED for _, _, size in _tensors(config, plain, outcomes))


def header_bytes(source: Source, like: Path | None, plain: Mapping[str, Shape], outcomes: Sequence[Outcome]) -> int:
    """Bytes before the first tensor: metadata, tokenizer and the list of tensors. What types linears have does not
    matter. Arguments as in `data_bytes`, and in `GgufConverter.convert`."""
    writer = gguf_vocab.described(source, source.name, like, LlamaFileType.ALL_F32)
    for name, shape, size in _tensors(source.text_config, plain, outcomes):
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=GGMLQuantizationType.F32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return -(-path.stat().st_size // _ALIGNED) * _ALIGNED


def _tensors(
    config: PretrainedConfig, plain: Mapping[str, Shape], outcomes: Sequence[Outcome]
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name in the file, shape and bytes of every tensor."""
    names = get_tensor_name_map(gguf_model.KNOWN[config.model_type].kind, config.num_hidden_layers)
    factors = gguf_model.frequency_factors(config)
    if factors is not None:
        yield "rope_freqs.weight", (len(factors),), 4 * len(factors)
    for x in outcomes:
        rows, width = x.out_features, x.in_features
        kind = gguf_blocks.type_of(x.scheme, rows, width)
        if kind is None:
            close = gguf_blocks.nearest_type(x.scheme, rows, width)
            raise PlanError(f"{x.name} is '{x.scheme.describe()}', which no type of GGUF holds: take {close} for it")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
        name = _named(names.get_name(f"{x.stored}.weight", try_suffixes=(".weight",)), x.stored)
        yield name, (rows, width), rows * width // block * size
    for stored, (dtype, shape) in plain.items():
        if config.tie_word_embeddings and stored == "lm_head.weight":
            continue
        name = _named(names.get_name(stored, try_suffixes=(".weight", ".bias")), stored)
        yield name, shape, math.prod(shape) * (4 if len(shape) == 1 else dtype.itemsize)


def _named(name: str | None, stored: str) -> str:
    if name is None:
        raise PlanError(f"tensor {stored} has no place in a GGUF file: keep the folder")
    return name
