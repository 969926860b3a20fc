"""From what the user wrote to a source: a folder, a GGUF file or a hub id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from lilliput.errors import SourceError
from lilliput.source import caches, inputs, quantized
from lilliput.source.gguf import Gguf
from lilliput.source.hub import snapshot
from lilliput.source.packed import Packed, floats
from lilliput.source.reader import Reader
from lilliput.source.shards import INDEX, PICKLES, WHOLE, Shards, pickles, refuse_pickles
from lilliput.source.source import Source
from lilliput.source.turned import Turned
from lilliput.source.wrapped import Unwrapped

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ADAPTER = "adapter_config.json"
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def open_source(model: str, *, trust_remote_code: bool = False, prefix: tuple[str, str] = ("", "")) -> Source:
    """A checkpoint by local folder, .gguf file or hub id; weights stay in the files until they are read.

    `prefix`: what names in the files begin with, and what they are to begin with instead; see `Unwrapped`.

    Raises SourceError: not there, not a model, pickles, a missing or damaged shard, a quantization without a reader.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _file(model, path)
    if path.is_dir():
        return _folder(model, path, trust_remote_code, prefix)
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise SourceError(f"There is no file or folder '{model}'. Check the path.")
    return _folder(model, snapshot(model, trust_remote_code), trust_remote_code, prefix)


def _file(model: str, path: Path) -> Source:
    if path.suffix == ".gguf":
        if "-of-" in path.stem:
            raise SourceError(
                f"{path} is one of several parts. Join them with `llama-gguf-split --merge {path.name} OUT.gguf`."
            )
        reader = Gguf(path)
        notes: tuple[str, ...] = ()
        if reader.unnamed:
            notes = (f"tensors of the GGUF file that transformers has no place for: {', '.join(reader.unnamed)}",)
        return Source(model, path.parent, reader.config, reader, {}, gguf=path.name, notes=notes)
    if path.suffix in PICKLES:
        raise refuse_pickles([path.name], path.parent)
    raise SourceError(f"'{model}' is a file. Give the folder that holds it together with config.json, or a .gguf file.")


def _folder(model: str, folder: Path, trust_remote_code: bool, prefix: tuple[str, str]) -> Source:
    if (folder / ADAPTER).is_file():
        raise SourceError(
            f"{folder} holds an adapter ({ADAPTER}), which belongs on top of a model's own weights. Merge the two "
            "(`merge_and_unload()` of peft), save the result, and give that folder; or remove the adapter's files."
        )
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        if len(files) == 1:
            return _file(model, files[0])
        if files:
            raise SourceError(
                f"{folder} holds {len(files)} GGUF files. Name one: {', '.join(x.name for x in files[:4])}."
            )
        if names := pickles(folder):
            raise refuse_pickles(names, folder)
        raise SourceError(
            f"{folder} is not a model: it has no config.json. Give the folder that `save_pretrained` wrote."
        )
    raw = _json(folder / "config.json")
    config = _config(folder, trust_remote_code)
    named = raw.get("transformers_weights")
    shards = Shards(folder, None if named is None else str(named))
    reader = Unwrapped(shards, *prefix)
    notes = _choice(folder, shards) + _renamed(reader)
    how = _quantization(raw)
    dtype = _declared(config, reader)
    if how is None:
        packed: Mapping[str, Packed] = floats(reader, dtype)
        method = None
        if packed:
            notes += (
                f"{len(packed)} of its tensors are 8-bit floats without scales; they are read as {_short(dtype)}",
            )
    else:
        packed = quantized.find(reader, how, dtype, model)
        _strip(config)
        method = str(how.get("quant_method", "compressed-tensors"))
        notes += (f"its weights are already quantized ({method}); they are read as {_short(dtype)}",)
        if any(isinstance(x, Turned) for x in packed.values()):
            notes += ("rotations that an engine applies while it runs (transform_config) are undone in its weights",)
    return Source(
        model, folder, config, reader, packed, raw=raw, quantization=method, trust_remote_code=trust_remote_code,
        notes=notes, inputs=inputs.find(method, how or {}, reader, model),
        caches=caches.find(method, how or {}, config.get_text_config(decoder=True), reader, model),
    )  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _choice(folder: Path, shards: Shards) -> tuple[str, ...]:
    """Which weights were taken, where the folder also has others."""
    chosen = shards.chosen.name
    others = [x for x in (WHOLE, INDEX) if x != chosen and (folder / x).is_file()]
    return (
        (f"its weights are those of {chosen}, which transformers uses, and not those of {others[0]}",) if others else ()
    )


def _renamed(reader: Unwrapped) -> tuple[str, ...]:
    if not reader.renamed:
        return ()
    name, stored = next(iter(reader.renamed.items()))
    return (f"tensors have the names of a wrapper around the model ({stored}): read as {name}",)


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise SourceError(f"{path} is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(raw, dict) or not ("model_type" in raw or "auto_map" in raw):
        raise SourceError(f"{path} names no model_type, so it is not the config of a transformers model.")
    return raw


def _config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, ImportError, AttributeError) as error:
        text = str(error).strip()
        if "trust_remote_code" in text or "custom code" in text:
            raise SourceError(
                f"{folder} comes with Python code of its own, which is never run: give a model of an "
                "architecture that transformers itself has, or update transformers if it has this one by now."
            ) from error
        first = text.splitlines()[0] if text else type(error).__name__
        raise SourceError(f"transformers cannot read {folder / 'config.json'}: {first}") from error


def _quantization(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of the checkpoint or of the language model in it."""
    for place in (raw, raw.get("text_config") or {}, raw.get("llm_config") or {}):
        how = place.get("quantization_config") or place.get("compression_config")
        if how:
            return dict(how)
    return None


def _strip(config: PretrainedConfig) -> None:
    """Weights are read as plain, so nothing may say that they are quantized."""
    for part in {id(x): x for x in (config, config.get_text_config(decoder=True))}.values():
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)


def _declared(config: PretrainedConfig, reader: Reader) -> torch.dtype:
    """The dtype that the folder declares for its weights, else the one that most of its plain tensors have.

    bfloat16, which holds every 8-bit float, where there is neither.
    """
    for part in (config, config.get_text_config(decoder=True)):
        dtype = getattr(part, "dtype", None)
        if isinstance(dtype, torch.dtype) and dtype in PLAIN:
            return dtype
    sizes = {x: sum(e.nbytes for e in reader.entries.values() if e.dtype == x) for x in PLAIN}
    return max(PLAIN, key=lambda x: sizes[x]) if any(sizes.values()) else torch.bfloat16
