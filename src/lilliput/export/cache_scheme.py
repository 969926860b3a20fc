"""The one compressed cache that compressed-tensors describes: `kv_cache_scheme`, of all blocks alike.

Beside it each attention has `k_scale` and `v_scale`, which the codec names alike (`runtime/caches/fp8.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lilliput.runtime.caches import Entry
from lilliput.runtime.caches.fp8 import Fp8Spec

# What the library asks of an attention, beside an argument that its cache is handed in by.
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")


def refuse(entries: Sequence[Entry], model: nn.Module, blocks: Sequence[str]) -> str | None:
    """Why compressed-tensors cannot say how these caches are stored; None where it can. model: with the entries'
    blocks by name; blocks: all that it has."""
    other = next((x.spec.kind for x in entries if not isinstance(x.spec, Fp8Spec)), None)
    if other is not None:
        return f"it knows no cache but that of kv-fp8, and the recipe has {other}"
    stored = {name for x in entries for name in x.blocks}
    plain = [x for x in blocks if x not in stored]
    if plain:
        return f"its cache is that of all blocks, and {plain[0]} keeps a plain one"
    for entry in entries:
        attention = model.get_submodule(f"{entry.blocks[0]}.{entry.attention}")
        known = "attention" in type(attention).__name__.lower() and any(hasattr(attention, x) for x in _PROJECTIONS)
        if not known:
            return f"it does not take {type(attention).__name__} for an attention"
    return None


def described(entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entry `quantization_config` of compressed-tensors, or none where all weights are plain, with the cache."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationStatus

    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    if entry is not None:
        return {**entry, "kv_cache_scheme": args.model_dump(mode="json", exclude_none=True)}
    alone = QuantizationConfig(
        config_groups={},
        format="dense",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[],
        kv_cache_scheme=args,
    )
    plain: dict[str, Any] = alone.model_dump(mode="json", exclude_none=True)
    return plain


def found_by_transformers(model: nn.Module, config: Mapping[str, Any]) -> bool:
    """Whether the installed compressed-tensors rounds keys and values in transformers' models; model: on the meta
    device, and changed by the attempt."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    from lilliput.export.engine import trial

    cache = {**config, "config_groups": {}}
    with trial():
        apply_quantization_config(model, QuantizationConfig.model_validate(cache))
    return any(name.endswith(".k_scale") for name, _ in model.named_parameters())
