"""Everything of a written folder beside the weights, and the exact size of the weights' files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput.errors import PlanError
from lilliput.report.card import Card, render
from lilliput.report.provenance import NAME, Provenance

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
OWN = ("config.json", "README.md", NAME, INDEX)  # written here, never carried over

# name in the header, and rank in the file: wide types first, so that every tensor is aligned
_STORED: dict[torch.dtype, tuple[str, int]] = {
    torch.bool: ("BOOL", 0),
    torch.uint8: ("U8", 1),
    torch.int8: ("I8", 2),
    torch.float8_e5m2: ("F8_E5M2", 3),
    torch.float8_e4m3fn: ("F8_E4M3", 4),
    torch.int16: ("I16", 6),
    torch.uint16: ("U16", 7),
    torch.float16: ("F16", 8),
    torch.bfloat16: ("BF16", 9),
    torch.int32: ("I32", 10),
    torch.float32: ("F32", 12),
    torch.float64: ("F64", 14),
    torch.int64: ("I64", 15),
}


def model_config(
    config: PretrainedConfig,
    *,
    quantization: Mapping[str, Any] | None,
    dtype: torch.dtype,
    tied: bool,
    architecture: str | None = None,
) -> dict[str, Any]:
    """config.json as plain data: the source's config with its new quantization, dtype and tying.

    `architecture` names the model class where the source's config does not.
    """
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "quantization_config", "torch_dtype"):
        plain.pop(key, None)
    name = str(dtype).removeprefix("torch.")
    plain |= {"dtype": name, "tie_word_embeddings": tied}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = {**plain["text_config"], "dtype": name, "tie_word_embeddings": tied}
        plain["text_config"].pop("quantization_config", None)
    if not plain.get("architectures") and architecture:
        plain["architectures"] = [architecture]
    if quantization is not None:
        plain["quantization_config"] = dict(quantization)
    return plain


def write_side_files(
    folder: Path,
    *,
    source_side_files: Sequence[Path],
    config: Mapping[str, Any],
    provenance: Provenance,
    card: Card,
) -> None:
    """Write config.json, README.md and lilliput.json, and copy the source's side files by their plain names.

    Nothing outside `folder` is written: a link that stands where a file is to go raises PlanError.
    """
    for path in source_side_files:
        if path.name not in OWN:
            shutil.copyfile(path, _free(folder, path.name))
    _write(folder, "config.json", json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    _write(folder, "README.md", render(card))
    _write(folder, NAME, provenance.to_json())


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total_size: int) -> None:
    """The index of several weight files. `shards`: file name to tensor names; `total_size`: bytes of all tensors."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    _write(folder, INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def safetensors_bytes(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> int:
    """Exact size of the safetensors file that holds these tensors, header and padding included.

    Offsets are written in decimal, so the header's length depends on the order of the tensors: widest type first, then
    by name, as the library writes them.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    offset = 0
    for name in sorted(tensors, key=lambda n: (-_STORED[tensors[n][0]][1], n)):
        dtype, shape = tensors[name]
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        offsets = [offset, offset + size]
        header[name] = {"dtype": _STORED[dtype][0], "shape": list(shape), "data_offsets": offsets}
        offset += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8 + offset


def _free(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_symlink():
        raise PlanError(f"{path} is a link, and nothing outside the output folder is written: remove it")
    return path


def _write(folder: Path, name: str, text: str) -> None:
    _free(folder, name).write_text(text, encoding="utf-8")
