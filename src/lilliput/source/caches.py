"""How a folder's config says that its model stores keys and values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lilliput.errors import SourceError
from lilliput.runtime.caches import Entry
from lilliput.runtime.caches.codec import CacheShape
from lilliput.runtime.caches.fp8 import KEY, VALUE, Fp8Spec
from lilliput.source.reader import Reader

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def find(
    method: str | None, how: Mapping[str, Any], config: PretrainedConfig, reader: Reader, label: str
) -> list[dict[str, Any]]:
    """The entries of `runtime.caches`. config: the language model's. Raises SourceError for a cache of
    compressed-tensors that cannot be computed here."""
    if method == "lilliput":
        return list(how.get("caches") or ())
    scheme = how.get("kv_cache_scheme") if method == "compressed-tensors" else None
    return [] if scheme is None else _compressed(scheme, config, reader, label)


def _compressed(
    scheme: Mapping[str, Any], config: PretrainedConfig, reader: Reader, label: str
) -> list[dict[str, Any]]:
    said = (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy"))
    if said != (8, "float", "tensor") or scheme.get("dynamic") or not scheme.get("symmetric", True):
        kind = "dynamic" if scheme.get("dynamic") else "static"
        raise SourceError(
            f"{label} stores keys and values as {said[0]}-bit {said[1]} by {said[2]}, {kind}, which is not computed "
            "here: take the entry 'kv_cache_scheme' out of its quantization_config to read the model without it"
        )
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    attentions: dict[str, list[str]] = {}
    for name in reader.entries:
        place, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"(.*\.\d+)\.(.+)", place)
        if leaf != KEY or match is None:
            continue
        if f"{place}.{VALUE}" not in reader.entries:
            raise SourceError(f"{label}: {place}.{VALUE} is missing, and its keys and values are stored with scales.")
        attentions.setdefault(match[2], []).append(match[1])
    if not attentions:
        raise SourceError(
            f"{label}: its quantization_config has a kv_cache_scheme with static scales, and the files have none "
            f"({KEY}, {VALUE}): copy all files of the folder, or take the entry out"
        )
    shape = CacheShape(heads, width, width)
    return [Entry(Fp8Spec(), tuple(blocks), attention, shape).plain() for attention, blocks in attentions.items()]
