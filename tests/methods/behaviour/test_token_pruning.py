"""Token pruning against a slow model that keeps every token and masks those that have left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import lilliput
from lilliput import api
from lilliput.errors import LilliputError, PlanError, SourceError
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe
from lilliput.runtime import behaviours
from lilliput.runtime.behaviours import layer as layers
from lilliput.runtime.behaviours import received as attention

BLOCKS = [f"model.layers.{n}" for n in range(4)]


def model(implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=61, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
        intermediate_size=48, max_position_embeddings=64, attn_implementation=implementation,
    )  # fmt: skip
    made = tf.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for value in made.parameters():
            if value.dim() > 1:
                value.mul_(6.0)
    return made


def pruned(keep: float, at: list[int], implementation: str = "sdpa") -> Any:
    made = model(implementation)
    entry = {"kind": "token-pruning", "blocks": BLOCKS, "layers": at, "keep": keep}
    behaviours.install(made, [entry], lambda name: torch.empty(0))
    return made


def tokens(batch: int = 1, count: int = 14) -> Tensor:
    return torch.randint(0, 61, (batch, count), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def slow(whole: Any, ids: Tensor, prompt: int, at: list[int], keep: float) -> tuple[Tensor, list[list[int]]]:
    """Logits [tokens, vocabulary] of one text, and the prompt's tokens that enter each block. Every token goes through
    every block; those that have left are seen by nobody but themselves."""
    count = ids.shape[1]
    body = whole.model
    hidden = body.embed_tokens(ids)
    turned = body.rotary_emb(hidden, position_ids=torch.arange(count)[None])
    alive, entered = list(range(prompt)), []
    for number, block in enumerate(body.layers):
        entered.append(list(alive))
        mask = torch.full((1, 1, count, count), -torch.inf, dtype=torch.float64)
        for i in range(count):
            for j in range(i + 1):
                if j in alive or j >= prompt or j == i:
                    mask[0, 0, i, j] = 0.0
        weights: list[Tensor] = []
        hook = block.self_attn.register_forward_hook(lambda _, args, out, weights=weights: weights.append(out[1][0]))
        out = block(hidden, attention_mask=mask, position_embeddings=turned)
        hidden = out if isinstance(out, Tensor) else out[0]
        hook.remove()
        if number in at:
            importance = {}
            for j in alive:
                looks = [float(weights[0][h, i, j]) for h in range(len(weights[0])) for i in alive]
                importance[j] = sum(looks) / len(looks)
            importance[alive[-1]] = math.inf
            most = math.ceil(keep * len(alive))
            alive = sorted(sorted(alive, key=lambda j: (-importance[j], j))[:most])
    return whole.lm_head(body.norm(hidden))[0], entered


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generating_is_that_of_a_model_that_masks_what_has_left(implementation: str) -> None:
    whole, fast, ids, at = model("eager"), pruned(0.4, [0, 2], implementation), tokens(), [0, 2]
    out = fast.generate(
        ids, max_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    text, entered = ids, []
    for step in range(7):
        logits, entered = slow(whole, text, ids.shape[1], at, 0.4)
        torch.testing.assert_close(out.logits[step][0].double(), logits[-1], rtol=1e-5, atol=1e-5)
        text = torch.cat([text, logits[-1].argmax()[None, None]], dim=1)
    assert torch.equal(out.sequences, text)
    assert [len(x) for x in entered] == [14, 6, 6, 3] == list(behaviours.require(fast).lengths(14) or ())


def test_a_layer_keeps_keys_of_the_tokens_that_enter_it_in_their_order() -> None:
    fast, ids = pruned(0.5, [0, 2]), tokens(batch=3)
    with torch.no_grad():
        out = fast(ids, use_cache=True)
    keys = set(out.keys())
    cache = out["cache"] if "cache" in keys else out["past_key_values"]
    assert [cache.get_seq_length(n) for n in range(4)] == [14, 7, 7, 4]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
    with torch.no_grad(), pytest.raises(LilliputError, match="was cut"):
        fast(ids[:, :1], **{"cache" if "cache" in keys else "past_key_values": cache})
    kept = getattr(cache, layers.KEPT)
    for row in range(3):
        _, entered = slow(model("eager"), ids[row : row + 1], 14, [0, 2], 0.5)
        for number in (1, 2, 3):
            assert kept[number][0][row].tolist() == entered[number]
        assert entered[3][-1] == 13


def test_keeping_all_is_the_model_itself() -> None:
    ids = tokens(2)
    with torch.no_grad():
        assert torch.equal(pruned(1.0, [0, 1])(ids).logits, model()(ids).logits)


def test_a_prompt_and_its_continuation_may_be_read_at_once() -> None:
    fast, ids = pruned(0.5, [1]), tokens(count=20)
    logits, _ = slow(model("eager"), ids, 12, [1], 0.5)
    with torch.no_grad(), behaviours.prompted(fast, 12):
        found = fast(ids).logits[0]
    torch.testing.assert_close(found[11:], logits[11:], rtol=1e-5, atol=1e-5)
    assert behaviours.require(fast).work.share() == pytest.approx((2 * 20 + 2 * 14) / (4 * 20))


def test_attention_received_is_the_mean_over_heads_and_queries() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8, generator=draw), torch.randn(2, 2, 9, 8, generator=draw)
    whole = attention.received(query, key, None, 0.3, 7)
    for row in range(2):
        for j in range(7):
            total = 0.0
            for h in range(4):
                for i in range(j, 7):
                    scores = [0.3 * float(query[row, h, i] @ key[row, h // 2, x]) for x in range(i + 1)]
                    total += math.exp(scores[j]) / sum(map(math.exp, scores))
            assert float(whole[row, j]) == pytest.approx(total / (4 * 7), rel=1e-4)
    few = attention.received(query, key, None, 0.3, 7, room=1)
    torch.testing.assert_close(few, whole)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(attention.received(query, key, mask, 0.3, 7), whole)
    capped = attention.received(query, key, None, 0.3, 7, softcap=1e6)
    torch.testing.assert_close(capped, whole)


def test_what_cannot_be_pruned_is_refused() -> None:
    fast, ids = pruned(0.5, [0], "eager"), tokens(2)
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with torch.no_grad():
        fast(ids, attention_mask=torch.ones_like(ids))
        mask = torch.full((1, 1, 14, 14), -torch.inf, dtype=torch.float64).triu(1)
        mask[..., :3] = -torch.inf
        with pytest.raises(LilliputError, match="padded: run prompts of one length"):
            fast(ids, attention_mask=mask)
        with pytest.raises(LilliputError, match="padded"):
            fast(ids, attention_mask=padded)
        damaged = pruned(0.5, [0, 1])
        damaged.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
        with pytest.raises(LilliputError, match="finite hidden states"):
            damaged(ids)


def test_windows_are_refused() -> None:
    torch.manual_seed(0)
    config = tf.MistralConfig(
        vocab_size=61, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=48, sliding_window=8,
    )  # fmt: skip
    made = tf.MistralForCausalLM(config)
    entry = {"kind": "token-pruning", "blocks": BLOCKS[:2], "layers": [0], "keep": 0.5}
    with pytest.raises(SourceError, match="window of 8 tokens"):
        behaviours.install(made, [entry], lambda name: torch.empty(0))


def recipe(**options: Any) -> Recipe:
    return Recipe.model_validate({"name": "few", "steps": [{"method": "token-pruning", "options": options}]})


def test_a_written_folder_prunes_wherever_it_is_loaded(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = api.compress(
        tiny("llama"), out, recipe=recipe(layers=(1,), keep=0.25), samples=1, tokens=16, device="cpu",
        dtype="float32", eval_windows=2, progress=Quiet(),
    )  # fmt: skip
    assert result.engine is not None
    assert result.engine.logits == pytest.approx(0.0, abs=1e-5)
    loaded: Any = lilliput.load(out)
    ids = torch.randint(0, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert behaviours.require(loaded).lengths(16) == (16, 16, 4, 4)
    work = json.loads((out / "lilliput.json").read_text())["measured"]["work"]
    assert work["kv_lengths"] == [128, 128, 32, 32]
    assert work["share"] == pytest.approx((2 * 256 + 2 * (128 + 32)) / (4 * 256))
    assert api.verify(out).whole
    read = open_model(out)
    read.load(list(read.skeleton.shapes))
    run: Any = read.skeleton.model
    with pytest.raises(LilliputError, match="whole texts are read"):
        run(input_ids=ids)
    with pytest.raises(PlanError, match="leaves tokens or channels out"):
        api.plan(out, recipe="rtn", samples=1, tokens=16)
    with pytest.raises(PlanError, match="leaves tokens or channels out"):
        api.convert(out, tmp_path / "other", to="compressed-tensors")


def test_the_plan_refuses_layers_that_are_none(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(PlanError, match="give layers from 0 to 2"):
        api.plan(tiny("llama"), recipe=recipe(layers=(3,)), samples=1, tokens=16)
    with pytest.raises(PlanError, match="experts"):
        api.plan(tiny("mixtral"), recipe=recipe(layers=(0,)), samples=1, tokens=16)
    other = recipe().model_copy(update={"export": "compressed-tensors"})
    with pytest.raises(PlanError, match="set `export: lilliput`"):
        api.plan(tiny("llama"), recipe=other, samples=1, tokens=16)
    steps = [{"method": "token-pruning"}, {"method": "rtn"}]
    with pytest.raises(PlanError, match="move it to the end"):
        api.plan(tiny("llama"), recipe=Recipe.model_validate({"name": "x", "steps": steps}), samples=1, tokens=16)
