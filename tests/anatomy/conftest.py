"""Small random models of every architecture, and their tensors under canonical names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.anatomy.explore import explore
from lilliput.anatomy.model import Anatomy
from lilliput.anatomy.skeleton import Skeleton

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 64, 32, 40, 2, 4
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 2,
    "n_routed_experts": 4,
    "num_key_value_heads": HEADS,
}

CONFIGS: Mapping[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**LLAMA),
    "llama_tied_bias": lambda: tf.LlamaConfig(
        **LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "mistral": lambda: tf.MistralConfig(**LLAMA, sliding_window=8),
    "qwen2": lambda: tf.Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA, head_dim=8),
    "gemma2": lambda: tf.Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **LLAMA,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: tf.Phi3Config(**LLAMA),
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64),
    "opt": lambda: tf.OPTConfig(
        **GPT, ffn_dim=INNER, num_attention_heads=HEADS, max_position_embeddings=64, word_embed_proj_dim=HIDDEN
    ),
    "opt_post_norm": lambda: tf.OPTConfig(
        **GPT,
        ffn_dim=INNER,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **GPT, intermediate_size=INNER, num_attention_heads=HEADS, max_position_embeddings=64, rotary_pct=0.5
    ),
    "gpt_neox_serial": lambda: tf.GPTNeoXConfig(
        **GPT, intermediate_size=INNER, num_attention_heads=HEADS, use_parallel_residual=False
    ),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "falcon": lambda: tf.FalconConfig(**GPT, num_attention_heads=HEADS, multi_query=True, bias=False),
    "falcon_new": lambda: tf.FalconConfig(
        **GPT, num_attention_heads=HEADS, num_kv_heads=2, new_decoder_architecture=True, bias=False
    ),
    "falcon_alibi": lambda: tf.FalconConfig(
        **GPT, num_attention_heads=HEADS, multi_query=False, parallel_attn=False, alibi=True, bias=True
    ),
    "mixtral": lambda: tf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, mlp_only_layers=[1]
    ),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=24
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8
    ),
    "xglm": lambda: tf.XGLMConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        ffn_dim=INNER,
        num_layers=LAYERS,
        attention_heads=HEADS,
        max_position_embeddings=64,
    ),
    "deepseek_v2": lambda: tf.DeepseekV2Config(**(LLAMA | LATENT)),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**(LLAMA | LATENT)),
}


class Random:
    """A real transformers model with random weights, and its tensors under canonical names."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config = config
        torch.manual_seed(seed)
        self.model = tf.AutoModelForCausalLM.from_config(config).eval()
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in self.model.parameters():
                value.add_(torch.randn(value.shape, generator=rng) * 0.1)
        self.tensors: dict[str, Tensor] = {}
        state = self.model.state_dict()
        for name, value in state.items():
            if f"{name}_bias" in state:  # another form of experts, which stays as it is
                self.tensors[name] = value
            elif name.endswith("experts.gate_up_proj"):
                for e, both in enumerate(value):
                    gate, up = both.chunk(2, dim=0)
                    stem = name.removesuffix("gate_up_proj")
                    self.tensors[f"{stem}{e}.gate_proj.weight"] = gate
                    self.tensors[f"{stem}{e}.up_proj.weight"] = up
            elif name.endswith("experts.down_proj"):
                for e, down in enumerate(value):
                    self.tensors[f"{name.removesuffix('down_proj')}{e}.down_proj.weight"] = down
            else:
                self.tensors[name] = value

    def ids(self, batch: int = 2, tokens: int = 11) -> Tensor:
        rng = torch.Generator().manual_seed(7)
        return torch.randint(1, VOCAB, (batch, tokens), generator=rng)

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False).logits.float()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=CONFIGS)
def random_model(request: pytest.FixtureRequest) -> Random:
    return Random(CONFIGS[request.param]())


@pytest.fixture(scope="session")
def explored() -> Callable[[str], tuple[Random, Anatomy]]:
    """A random model by name, and its anatomy; each made once."""
    known: dict[str, tuple[Random, Anatomy]] = {}

    def get(name: str) -> tuple[Random, Anatomy]:
        if name not in known:
            model = Random(CONFIGS[name]())
            known[name] = (model, explore(Skeleton(model.config)))
        return known[name]

    return get
