"""The native layout inside vLLM: every packed weight is decoded once, while the model is loaded.

vLLM builds the model that an uncompressed checkpoint would have, and gets the tensors of one, in the order of the files
and one at a time: what it does with them (fusing q, k and v, batching experts, sharing them out to processes) it does
itself, so that every architecture of vLLM works whose checkpoint does. Run-time transforms are undone in the weights, a
packed embedding is decoded whole. No kernel multiplies with packed codes: the served model takes the memory of an
uncompressed one and runs at its speed. Only the file is small.

Needs `--load-format lilliput` beside the folder, because vLLM asks a quantization for layers and not for the reader of
its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig, get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from lilliput.anatomy.widths import sizes_of
from lilliput.engines.decoded import weights
from lilliput.errors import SourceError
from lilliput.parts.linear import parse_config
from lilliput.source.open import open_source
from lilliput.source.source import Source

NAME = "lilliput"


class LilliputConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a native folder: plain layers, because the loader decodes what goes into them."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LilliputConfig:
        """Raises SourceError for a version or part that this Lilliput does not know."""
        specs = parse_config(config)
        if any(spec.scheme.activation is not None for spec in specs.values()):
            raise SourceError(
                "the folder's model rounds the inputs of its linears, which vLLM would not do for this layout: run it "
                "with transformers, or write the folder with export compressed-tensors, where that holds it"
            )
        if config.get("behaviours"):
            raise SourceError(
                "the folder's model leaves tokens or channels out while it runs, which vLLM would not do: run it with "
                "transformers, or compress the model without token-pruning and dynamic-pruning"
            )
        if config.get("caches"):
            raise SourceError(
                "the folder's model stores keys and values compressed, which vLLM would not do: run it with "
                "transformers, or compress the model without the step for its cache"
            )
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM runs a layer without a quantization. Raises SourceError where another loader is about to fill it."""
        given = get_current_vllm_config().load_config.load_format
        if given not in (NAME, "dummy"):
            raise SourceError(
                f"the folder is in Lilliput's own layout, and load format '{given}' cannot decode it: add "
                f"--load-format {NAME} (from Python load_format='{NAME}')"
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class LilliputLoader(BaseModelLoader):  # type: ignore[misc]
    """Hands vLLM's models the tensors of a folder as an uncompressed checkpoint would hold them."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)

    def download_model(self, model_config: ModelConfig) -> None:
        opened(model_config)

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Fill a model that vLLM has built. Raises SourceError where a parameter of it finds no tensor."""
        filled = model.load_weights(weights(opened(model_config), model_config.dtype))
        if filled is None:
            return  # this architecture keeps no account
        missing = sorted({name for name, _ in model.named_parameters()} - set(filled))
        if missing:
            raise SourceError(
                f"{model_config.model} has no tensor for {missing[0]} of vLLM's {type(model).__name__}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}: compress the model again with this Lilliput"
            )


def opened(model_config: ModelConfig) -> Source:
    """The folder, or the hub's, that vLLM is to serve. Raises SourceError."""
    source = open_source(str(model_config.model), trust_remote_code=bool(model_config.trust_remote_code))
    if sizes_of(source.text_config):
        raise SourceError(
            f"{model_config.model} has blocks of different widths, and vLLM builds all by one config: serve it with "
            "`lilliput serve --engine transformers`, or compress it again with uniform: true"
        )
    return source
