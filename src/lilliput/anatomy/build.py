"""Build the module tree from a config: parameters on the meta device, computed buffers real, experts unrolled."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.anatomy import widths
from lilliput.anatomy.experts import is_batched, unroll
from lilliput.errors import SourceError

_NO_SDPA = ("scaled_dot_product_attention", "sdpa")
# What a model's code raises where the numbers of a config do not go together.
_BROKEN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A model on the meta device, the names of its blocks, its head, and what is worth knowing about them."""

    model: nn.Module
    blocks: tuple[str, ...]
    head: nn.Module
    tied: bool
    notes: tuple[str, ...]


def build(config: Any, dtype: torch.dtype, device: str) -> Built:
    """The model of a text config, without memory for its parameters. The config itself is not changed."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # the loss that reads them is not computed here

    def make() -> nn.Module:
        model: nn.Module
        with torch.device("meta"), no_init_weights():
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
            except _BROKEN as error:
                if not isinstance(error, ValueError) or not any(x in str(error) for x in _NO_SDPA):
                    raise _unbuilt(config, error) from error
                try:
                    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
                except _BROKEN as again:
                    raise _unbuilt(config, again) from again
        return model.eval().requires_grad_(False)

    model = make()
    model.tie_weights()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise SourceError(
            f"{type(model).__name__} has no output projection: only causal language models can be compressed"
        )
    widths.resize(model, config)
    notes = _unroll_experts(model)
    _keep_float32(model, dtype)
    _fill_buffers(model, device)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return Built(model, widths.find_blocks(model), head, head.weight is embedding.weight, tuple(notes))


def _unbuilt(config: Any, error: Exception) -> SourceError:
    """The one message for a config that transformers takes and makes no model of."""
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        return SourceError(
            f"pad_token_id is {pad} in config.json, beyond a vocabulary of {size}, and transformers builds no model of "
            "it: a pad token was added to the tokenizer alone. Correct pad_token_id, or set it to null."
        )
    first = (str(error).strip().splitlines() or [""])[0]
    return SourceError(
        f"transformers cannot build this config as a causal language model: {first or type(error).__name__}"
    )


def _unroll_experts(model: nn.Module) -> list[str]:
    notes: list[str] = []
    verdicts: dict[tuple[Any, ...], bool] = {}
    for name, module in list(model.named_modules()):
        if not is_batched(module):
            continue
        kind = (type(module), *(tuple(p.shape) for p in module.parameters(recurse=False)))
        unrolled = unroll(module) if verdicts.get(kind, True) else None
        verdicts[kind] = unrolled is not None
        if unrolled is None:
            notes.append(f"{name}: 3-D tensors of {type(module).__name__} have an unknown form and are left unchanged")
        else:
            model.set_submodule(name, unrolled)
    return notes


def _keep_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Tensors that the model wants in float32 whatever the dtype, as transformers' own loader keeps them."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                parts = set(f"{path}.{key}".split("."))
                if value is not None and value.is_floating_point() and parts & patterns:
                    table[key] = _like(value, torch.float32)


def _like(value: Tensor, dtype: torch.dtype) -> Tensor:
    empty = torch.empty(value.shape, dtype=dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty


def _fill_buffers(model: nn.Module, device: str) -> None:
    """Compute the buffers that no checkpoint holds, by the model's own initialization, twice over different contents.

    What comes out different was not computed: SourceError, because nothing could load this model whole.
    """
    from transformers import PreTrainedModel

    owners: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    for path, module in model.named_modules():
        keys = [k for k in module._non_persistent_buffers_set if module._buffers.get(k) is not None]
        if not keys:
            continue
        above = [n for n in owners if n == "" or path == n or path.startswith(f"{n}.")]
        owner = owners[max(above, key=len)]
        results: list[dict[str, Tensor]] = []
        for content in (0, 1):
            for key in keys:
                old = module._buffers[key]
                module._buffers[key] = torch.full(old.shape, content, dtype=old.dtype, device=device)
            with torch.no_grad():
                owner._init_weights(module)
            results.append({k: module._buffers[k].clone() for k in keys})
        varying = [k for k in keys if not torch.equal(results[0][k], results[1][k])]
        if varying:
            raise SourceError(
                f"{type(model).__name__} does not recompute the buffers {varying} of '{path}', "
                "and no checkpoint holds them: the model cannot be run"
            )
