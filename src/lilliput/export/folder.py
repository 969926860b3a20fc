"""Everything of a written folder beside the weights, and the exact size of the weights' files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lilliput.errors import PlanError
from lilliput.export.card import Card, render
from lilliput.export.provenance import NAME, Provenance

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
SHARD = 5 * 10**9  # bytes of a file at most, header included, as engines and the hub have them
# Of the source's files alone. Code is not carried over: a model is written only where transformers has its class.
_OF_FILES = ("_name_or_path", "quantization_config", "compression_config", "transformers_weights", "auto_map")
_CLASSES = (
    "tokenizer_class",
    "processor_class",
    "image_processor_type",
    "video_processor_type",
    "feature_extractor_type",
)
OWN = ("config.json", "README.md", NAME, INDEX)  # written here, never carried over

# name in the header, and rank in the file: wide types first, so that every tensor is aligned
_STORED: dict[torch.dtype, tuple[str, int]] = {
    torch.bool: ("BOOL", 0),
    torch.uint8: ("U8", 1),
    torch.int8: ("I8", 2),
    torch.float8_e5m2: ("F8_E5M2", 3),
    torch.float8_e4m3fn: ("F8_E4M3", 4),
    torch.float8_e8m0fnu: ("F8_E8M0", 5),
    torch.int16: ("I16", 6),
    torch.uint16: ("U16", 7),
    torch.float16: ("F16", 8),
    torch.bfloat16: ("BF16", 9),
    torch.int32: ("I32", 10),
    torch.uint32: ("U32", 11),
    torch.float32: ("F32", 12),
    torch.complex64: ("C64", 13),
    torch.float64: ("F64", 14),
    torch.int64: ("I64", 15),
    torch.uint64: ("U64", 16),
}


def model_config(
    config: PretrainedConfig,
    *,
    quantization: Mapping[str, Any] | None,
    dtype: torch.dtype,
    tied: bool,
    architecture: str | None = None,
    raw: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json as plain data: the source's config with its new quantization, dtype and tying.

    `architecture` names the model class where the source's config does not. `raw` is the source's config.json: what it
    says under names of its own (`rope_theta`, and all that transformers has renamed or knows a default of) stays beside
    the new names, so that engines of either generation read the folder as they read the source.
    """
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    plain = _both(_without(raw or {}), _without(plain))
    name = str(dtype).removeprefix("torch.")
    for part in (plain, plain.get("text_config")):
        if isinstance(part, dict):
            part |= {"dtype": name, "tie_word_embeddings": tied}
            if "torch_dtype" in part:
                part["torch_dtype"] = name
    if not plain.get("architectures") and architecture:
        plain["architectures"] = [architecture]
    if quantization is not None:
        plain["quantization_config"] = dict(quantization)
    return plain


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what holds of the source's files alone: where they lay, how they were packed, code in them."""
    remaining = {key: value for key, value in config.items() if key not in _OF_FILES}
    return {key: _without(value) if isinstance(value, dict) else value for key, value in remaining.items()}


def _both(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of either, `new` where both have one; entries within entries alike."""
    merged = {**old, **new}
    for key in old.keys() & new.keys():
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            merged[key] = _both(old[key], new[key])
    return merged


def write_side_files(
    folder: Path,
    *,
    source_side_files: Mapping[str, Path],
    config: Mapping[str, Any],
    provenance: Provenance,
    card: Card,
) -> None:
    """Write config.json, README.md and lilliput.json, and copy the source's side files, given by name in the folder.

    They are copied as they are, but for references to Python code (`auto_map`), which is not carried over: these go
    where transformers has the classes itself. Nothing outside `folder` is written: a link that stands where a file is
    to go raises PlanError.
    """
    for name, path in source_side_files.items():
        if name in OWN:
            continue
        if (changed := _without_code(path)) is not None:
            _write(folder, name, changed)
        else:
            shutil.copyfile(path, _free(folder, name))
    _write(folder, "config.json", config_text(config))
    _write(folder, "README.md", render(card))
    _write(folder, NAME, provenance.to_json())


def config_text(config: Mapping[str, Any]) -> str:
    """config.json as it is written."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total_size: int) -> None:
    """The index of several weight files. `shards`: file name to tensor names; `total_size`: bytes of all tensors."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    _write(folder, INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def safetensors_bytes(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> int:
    """Exact size of the safetensors file that holds these tensors, header and padding included."""
    header, _ = safetensors_header(tensors, metadata)
    return len(header) + sum(prod(shape) * dtype.itemsize for dtype, shape in tensors.values())


def safetensors_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """What a safetensors file of these tensors begins with, its length and padding included, and their order after it:
    widest type first, then by name, as the library writes them."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    offset = 0
    order = sorted(tensors, key=lambda n: (-_STORED[tensors[n][0]][1], n))
    for name in order:
        dtype, shape = tensors[name]
        size = prod(shape) * dtype.itemsize
        offsets = [offset, offset + size]
        header[name] = {"dtype": _STORED[dtype][0], "shape": list(shape), "data_offsets": offsets}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def _without_code(path: Path) -> str | None:
    """A config of a tokenizer or processor without `auto_map`; None where it is to stay as it is."""
    if path.suffix != ".json" or b'"auto_map"' not in (content := path.read_bytes()):
        return None
    import transformers

    try:
        config = json.loads(content)
    except ValueError:
        return None
    if not isinstance(config, dict) or "auto_map" not in config:
        return None
    classes = [config[key] for key in _CLASSES if isinstance(config.get(key), str)]
    if not classes or not all(hasattr(transformers, x) for x in classes):
        return None
    return json.dumps({k: v for k, v in config.items() if k != "auto_map"}, indent=2, ensure_ascii=False) + "\n"


def _free(folder: Path, name: str) -> Path:
    path = folder / name
    for part in (path.parent, path):
        if part != folder and part.is_symlink():
            raise PlanError(f"{part} is a link, and nothing outside the output folder may be written: remove it")
    path.parent.mkdir(exist_ok=True)
    return path


def _write(folder: Path, name: str, text: str) -> None:
    _free(folder, name).write_text(text, encoding="utf-8")
