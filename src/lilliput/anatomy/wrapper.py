"""The module tree that an engine builds from a config: which linears it holds, and where ours sit in it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lilliput.anatomy.widths import resize
from lilliput.errors import SourceError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def opener(config: PretrainedConfig) -> Any:
    """The class of transformers whose `from_pretrained` opens a folder with this config as a model that writes text.

    Wrappers of other inputs than text are often known to another one than `AutoModelForCausalLM`. Raises SourceError
    where none knows it.
    """
    import transformers as tf

    autos = (tf.AutoModelForCausalLM, tf.AutoModelForImageTextToText, tf.AutoModelForMultimodalLM)
    for auto in autos:
        if type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or {}):
            return auto
    raise SourceError(
        f"transformers opens models of the type '{config.model_type}' with none of "
        f"{', '.join(auto.__name__ for auto in autos)}: give the folder of its language model alone"
    )


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model that `from_pretrained` builds for this config, on the meta device. SourceError where it builds none."""
    with torch.device("meta"):
        model: PreTrainedModel = opener(config).from_config(copy.deepcopy(config))  # building writes into the config
    resize(model, config.get_text_config(decoder=True))
    return model


def text_prefix(model: nn.Module, config: PretrainedConfig) -> str:
    """Module path of the language model's body inside a multimodal wrapper; "" where the model is the language model.

    Canonical names start with the base prefix of the text-only model ("model."), a wrapper puts them deeper
    ("model.language_model.").
    """
    from transformers import PreTrainedModel

    text = config.get_text_config(decoder=True)
    if text is config:
        return ""
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and module.config.model_type == text.model_type:
            return str(name)
    return ""


def module_name(canonical: str, modules: Iterable[str] | dict[str, nn.Module], prefix: str) -> str:
    """Where a canonical linear sits: itself, or below the wrapper's `prefix` in place of its first component."""
    if canonical in modules or not prefix:
        return canonical
    return f"{prefix}.{canonical.partition('.')[2]}"


def file_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The names that transformers gives these modules in files; engines of their own match by those."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    files: set[str] = set()
    back = [x.reverse_transform() for x in reversed(get_model_conversion_mapping(model, add_legacy=False))]
    for name in names:
        key = f"{name}.weight"
        for transform in back:
            renamed, matched = transform.rename_source_key(key)
            key = renamed if matched is not None else key
        files.add(key.removesuffix(".weight"))
    return files
