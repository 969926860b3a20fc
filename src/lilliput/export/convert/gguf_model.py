"""What llama.cpp calls a model's hyperparameters, and what it wants done to some tensors, by architecture.

Tensor names are the `gguf` package's (`get_tensor_name_map`). Values differ from transformers' in few places: query and
key rows of llama and mistral are permuted (rotary halves become pairs), gemma's norms are stored as 1 + w, GPT-2's
weights as [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType
from torch import Tensor

from lilliput.errors import PlanError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """activation: of the feed-forward, which llama.cpp takes for granted; pairs: query and key rows are permuted;
    shifted: norms are stored as 1 + w; heads: a head's width is always said; windows: the period in which all but the
    last layer look back over a sliding window only, unless the file says otherwise (0: llama.cpp has no windows)."""

    kind: MODEL_ARCH
    activation: tuple[str, ...] = ("silu", "swish")
    pairs: bool = False
    shifted: bool = False
    heads: bool = False
    windows: int = 0

    @property
    def name(self) -> str:
        return str(MODEL_ARCH_NAMES[self.kind])


_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function

_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")  # names of the option, the first that is set

# by transformers' model_type of the language model
KNOWN: Mapping[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA, pairs=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, pairs=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, heads=True),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, _TANH, shifted=True, heads=True, windows=2),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, _TANH, shifted=True, heads=True, windows=6),
    "phi3": Architecture(MODEL_ARCH.PHI3),
    "gpt2": Architecture(MODEL_ARCH.GPT2, _TANH),
}


def refuse(config: PretrainedConfig) -> str | None:
    """Why no GGUF file is written of a model, and what would help; None where one is."""
    if config.model_type not in KNOWN:
        return f"models of type '{config.model_type}' are not written as GGUF; these are: {', '.join(KNOWN)}"
    known = KNOWN[config.model_type]
    function = next(x for x in (getattr(config, name, None) for name in _ACTIVATIONS) if x)
    if function not in known.activation:
        return f"its activation is {function}, and llama.cpp takes {known.activation[0]} for a {known.name} model"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or not getattr(config, "scale_attn_weights", True):
        return "its attention is scaled by layer, and llama.cpp takes the width of a head"
    kind = _rope(config)[1].get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        return (
            f"its rotary embedding is of type '{kind}', which is not written as GGUF (default, linear and llama3 are): "
            "leave the model as a folder"
        )
    scalar = getattr(config, "query_pre_attn_scalar", None)
    wide = config.hidden_size // config.num_attention_heads if config.num_hidden_layers in (46, 62) else None
    if scalar is not None and scalar not in (wide, head_width(config)):
        return f"its attention is scaled by {scalar}, and llama.cpp takes the width of a head for its kind of model"
    return None


def notes(config: PretrainedConfig) -> tuple[str, ...]:
    """What llama.cpp does otherwise with texts longer than those that are compared."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if not window or KNOWN[config.model_type].windows or kinds == {"full_attention"}:
        return ()
    return (
        f"llama.cpp attends to all tokens and the model to the last {window}: they are alike up to {window} tokens",
    )


def _rope(config: PretrainedConfig) -> tuple[float | None, Mapping[str, Any]]:
    """The base of the rotary embedding of full attention, None where there is none, and all that is said of it."""
    said = getattr(config, "rope_parameters", None) or {}
    said = said.get("full_attention", said)
    base = said.get("rope_theta")
    return (None if base is None else float(base)), said


def head_width(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_hyperparameters(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """All that llama.cpp asks of the model, beside its tokenizer."""
    known = KNOWN[config.model_type]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if known.kind is MODEL_ARCH.GPT2:
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = head_width(config)
    if known.heads or width * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    base, said = _rope(config)
    if base is not None:
        writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(int(width * said.get("partial_rotary_factor", 1.0)))
    if said.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(said["factor"]))
    if (known.windows or known.kind is MODEL_ARCH.PHI3) and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    _add_windows(writer, config)
    if known.kind is MODEL_ARCH.PHI3:
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    for add, value in (
        (writer.add_attn_logit_softcapping, getattr(config, "attn_logit_softcapping", None)),
        (writer.add_final_logit_softcapping, getattr(config, "final_logit_softcapping", None)),
    ):
        if value:
            add(float(value))


def _add_windows(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Which layers look back over a sliding window, where that is not the usual, and their rotary base."""
    known = KNOWN[config.model_type]
    kinds = getattr(config, "layer_types", None)
    if not known.windows or not kinds:
        return
    local = [x == "sliding_attention" for x in kinds]
    if local != [i % known.windows < known.windows - 1 for i in range(len(local))]:
        writer.add_array(f"{known.name}.attention.sliding_window_pattern", local)
    own = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if own:
        writer.add_float32(f"{known.name}.rope.freq_base_swa", float(own["rope_theta"]))


def frequency_factors(config: PretrainedConfig) -> Tensor | None:
    """What llama 3.1 divides the rotary frequencies by, float32 [head width / 2]; None for other models."""
    base, said = _rope(config)
    if said.get("rope_type") != "llama3" or base is None:
        return None
    width = head_width(config)
    frequency = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    wave = 2 * math.pi / frequency
    low, high = float(said["low_freq_factor"]), float(said["high_freq_factor"])
    context, factor = float(said["original_max_position_embeddings"]), float(said["factor"])
    smooth = (context / wave - low) / (high - low)
    between = 1.0 / ((1 - smooth) / factor + smooth)
    out = torch.where(wave < context / high, 1.0, torch.where(wave > context / low, factor, between))
    return out.float()


def row_order(config: PretrainedConfig, name: str, rows: int) -> Tensor | None:
    """The row of transformers' tensor that each row of the GGUF tensor `name` is, int64 [rows]; None: as they are."""
    if not KNOWN[config.model_type].pairs or (".attn_q." not in name and ".attn_k." not in name):
        return None
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    if rows % (2 * heads):
        raise PlanError(f"tensor {name} has {rows} rows, which {heads} heads do not share evenly")
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
