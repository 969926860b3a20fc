"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes, before it reads a config.

Importing this module costs nothing, because vLLM loads every plugin, whatever model it is to serve.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM of `quant_method: "lilliput"` and of the load format of that name. Harmless when repeated."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from lilliput.engines import vllm_layout

    register_quantization_config(vllm_layout.NAME)(vllm_layout.LilliputConfig)
    register_model_loader(vllm_layout.NAME)(vllm_layout.LilliputLoader)
