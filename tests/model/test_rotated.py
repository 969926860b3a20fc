"""Rotated while it is read: the function stays, and what cannot be rotated is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.errors import LilliputError, PlanError
from lilliput.model.rotated import RotatedModel, turn
from lilliput.model.stored import Model, open_model
from lilliput.plan.plan import Plan, make
from lilliput.recipe.schema import Recipe, Step
from lilliput.run.editing import prepared
from lilliput.target import Target

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
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
}
ROTATED: dict[str, Callable[[], Any]] = {
    "llama, tied, biases": lambda: tf.LlamaConfig(
        **SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "gemma, tied, gains as 1 + w, scaled embedding": lambda: tf.GemmaConfig(**SHAPE, head_dim=8),
    "qwen3, norms of queries and keys": lambda: tf.Qwen3Config(**SHAPE, head_dim=8),
    "phi3, fused linears": lambda: tf.Phi3Config(**SHAPE),
    "mixtral, experts and their router": lambda: tf.MixtralConfig(**SHAPE, num_local_experts=4),
    "deepseek, latent attention, shared experts": lambda: tf.DeepseekV2Config(**(SHAPE | LATENT)),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "gemma 2, norms after the writers": lambda: tf.Gemma2Config(**SHAPE, head_dim=8, query_pre_attn_scalar=8),
    "gpt 2, layer norms": lambda: tf.GPT2Config(vocab_size=48, n_embd=24, n_layer=2, n_head=4, n_positions=32),
    "opt, layer norms": lambda: tf.OPTConfig(
        vocab_size=48, hidden_size=24, num_hidden_layers=2, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=24
    ),
}


def saved(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> tuple[Model, Any]:
    torch.manual_seed(0)
    whole = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for value in whole.parameters():
            value.add_(torch.randn(value.shape) * 0.1)
    whole.to(dtype).save_pretrained(folder)
    return open_model(str(folder)), whole


def logits(model: Model, ids: Tensor) -> Tensor:
    """Blockwise, with the skip connection's transforms where a model has any."""
    skeleton = model.skeleton
    with torch.no_grad():
        model.load(skeleton.embeddings)
        hidden, calls = skeleton.embed(ids)
        for i in range(len(skeleton.block_names)):
            model.load_block(i)
            hidden = skeleton.run(i, hidden, calls)
            model.unload_block(i)
            between = model.transition(i) if isinstance(model, RotatedModel) else None
            hidden = hidden if between is None else hidden @ between.float()
        model.load(skeleton.final)
        model.load([skeleton.head])
        return skeleton.logits(skeleton.finish(hidden))


def rotation(width: int, seed: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=rng))[0]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("make", ROTATED.values(), ids=ROTATED)
def test_logits_stay_in_any_basis(make: Callable[[], Any], tmp_path: Path) -> None:
    model, whole = saved(tmp_path, make())
    ids = torch.randint(3, 48, (2, 9))
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits.float()
    ready = RotatedModel(model)
    assert not ready.tied
    turned = ready.rotated(rotation(24))
    assert apart(logits(ready, ids), expected) < 1e-5
    assert apart(logits(turned, ids), expected) < 1e-4
    assert apart(logits(turned.rotated(rotation(24, 4)), ids), expected) < 1e-4
    bases = [rotation(24, seed) for seed in (5, 6, 7)]
    assert apart(logits(RotatedModel(model, bases), ids), expected) < 1e-4


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_does_not_commute_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    model, _ = saved(tmp_path, make())
    recipe = Recipe(steps=(Step(method="hadamard"),))
    with pytest.raises(PlanError, match="cannot be rotated"):
        prepared(model, recipe)
    assert prepared(model, Recipe(steps=(Step(method="rtn"),))) is model


def test_the_files_dtype_stays_outside_the_blocks_and_rows_go_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = saved(tmp_path, tf.LlamaConfig(**SHAPE, tie_word_embeddings=True), torch.bfloat16)
    turned = RotatedModel(model).rotated(rotation(24))
    table = "model.embed_tokens.weight"
    exact = model.read(table).double() @ rotation(24)
    whole = turned.read(table)
    assert whole.dtype == turned.dtype(table) == torch.bfloat16
    assert apart(whole.double(), exact) < 2**-8
    monkeypatch.setattr("lilliput.model.rotated.ROWS", 7)
    torch.testing.assert_close(turned.read(table), whole, rtol=0.01, atol=0.01)
    torch.testing.assert_close(turned.read_rows(table, 5, 9), whole[5:9], rtol=0.01, atol=0.01)
    gain = "model.norm.weight"
    assert bool((turned.read(gain) == 1).all())
    head = model.read(table).double() * model.read(gain).double() @ rotation(24)
    assert apart(turned.read("lm_head.weight").double(), head) < 2**-8
    assert turned.read("model.layers.0.self_attn.q_proj.weight").dtype == torch.float32


def test_the_plan_counts_the_head_that_is_no_longer_tied(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, tf.LlamaConfig(**SHAPE, tie_word_embeddings=True))

    def plan(*steps: Step) -> Plan:
        recipe = Recipe(steps=steps)
        ready = prepared(model, recipe)
        return make(ready, recipe, samples=2, tokens=8, budget=None, size=None, seed=None, dtype=torch.float32)

    pruning = Step(method="magnitude", target=Target(sparsity=0.5))
    tied, untied = plan(pruning), plan(Step(method="hadamard"), pruning)
    extra = [x for x in untied.tensors if x.kind == "untied head"]
    assert [(x.name, x.shape) for x in extra] == [("lm_head.weight", (48, 24))]
    assert not [x for x in tied.tensors if x.name == "lm_head.weight"]
    assert untied.bytes - tied.bytes >= 48 * 24 * 4
    assert untied.parameters == tied.parameters
    assert untied.batching.bytes > tied.batching.bytes


@pytest.mark.parametrize("kind", ["reader", "writer"])
def test_a_transposed_linear_turns_like_its_transpose(kind: str) -> None:
    weight, matrix = torch.randn(24, 24, dtype=torch.float64), rotation(24)
    straight = turn(weight, matrix, kind, transposed=False)
    torch.testing.assert_close(turn(weight.T, matrix, kind, transposed=True).T, straight)
    torch.testing.assert_close(straight, weight @ matrix if kind == "reader" else matrix.T @ weight)


def test_unusable_matrices_are_refused(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, tf.LlamaConfig(**SHAPE))
    ready = RotatedModel(model)
    with pytest.raises(LilliputError, match="orthogonal"):
        ready.rotated(torch.ones(24, 24))
    with pytest.raises(LilliputError, match=r"\[24, 24\]"):
        ready.rotated(torch.eye(8, dtype=torch.float64))
    with pytest.raises(LilliputError, match="one basis each"):
        RotatedModel(model, [torch.eye(24, dtype=torch.float64)])
