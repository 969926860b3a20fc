"""The skeleton against the real transformers models."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton, positions
from lilliput.errors import SourceError


def blockwise(skeleton: Skeleton, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits with one block's tensors in place at a time."""

    def load(names: tuple[str, ...]) -> None:
        skeleton.load({n: tensors[n] for n in names})

    with torch.no_grad():
        load(skeleton.embeddings)
        hidden, calls = skeleton.embed(ids)
        skeleton.unload(skeleton.embeddings)
        for i in range(len(skeleton.block_names)):
            load(skeleton.names_of(i))
            hidden = skeleton.run(i, hidden, calls)
            skeleton.unload(skeleton.names_of(i))
        load(skeleton.final)
        hidden = skeleton.finish(hidden)
        skeleton.unload(skeleton.final)
        load(tuple(n for n in tensors if n.rpartition(".")[0] == skeleton.head.rpartition(".")[0]))
        return skeleton.logits(hidden)


def test_blockwise_logits_are_the_models(random_model: Any) -> None:
    skeleton = Skeleton(random_model.config)
    ids = random_model.ids()
    expected = random_model.logits(ids)
    got = blockwise(skeleton, random_model.tensors, ids)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-4


def test_blocks_that_read_in_pieces_give_what_they_give_at_once(random_model: Any) -> None:
    """With a plain cache in between, called as the model's forward pass calls them after so many tokens."""
    skeleton, ids = Skeleton(random_model.config), random_model.ids()
    cut = ids.shape[1] // 2
    try:
        pieces = [skeleton.calls(len(ids), cut, past=0), skeleton.calls(len(ids), ids.shape[1] - cut, past=cut)]
    except (RuntimeError, SourceError):
        assert skeleton.config.model_type in ("opt",)  # its positions are made of the mask
        return
    hidden = torch.randn(*ids.shape, skeleton.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = skeleton.calls(*ids.shape)
    with torch.no_grad():
        for i in range(len(skeleton.block_names)):
            skeleton.load({n: random_model.tensors[n] for n in skeleton.names_of(i)})
            expected = skeleton.run(i, hidden, whole)
            cache = tf.DynamicCache(config=skeleton.config)
            parts = zip(hidden.split([cut, ids.shape[1] - cut], dim=1), pieces, strict=True)
            found = torch.cat([skeleton.run(i, part, calls, cache=cache) for part, calls in parts], dim=1)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert cache.get_seq_length(i) == ids.shape[1]
            skeleton.unload(skeleton.names_of(i))


def test_every_tensor_has_one_place(random_model: Any) -> None:
    skeleton = Skeleton(random_model.config)
    blocks = [n for i in range(len(skeleton.block_names)) for n in skeleton.names_of(i)]
    outer = {*skeleton.embeddings, *skeleton.final, skeleton.head}
    head = skeleton.head.rpartition(".")[0]
    assert not outer & set(blocks)
    assert outer | set(blocks) >= set(skeleton.shapes) - {n for n in skeleton.shapes if n.startswith(head)}
    expected = {n: tuple(t.shape) for n, t in random_model.tensors.items()}
    assert {n: expected[n] for n in skeleton.shapes} == dict(skeleton.shapes)
    left_out = set(expected) - set(skeleton.shapes)
    assert left_out == ({f"{random_model_head(random_model)}.weight"} if skeleton.tied else set())


def random_model_head(random_model: Any) -> str:
    head = random_model.model.get_output_embeddings()
    return next(n for n, m in random_model.model.named_modules() if m is head)


def test_gemma_attention_is_causal_and_soft_capped(explored: Any) -> None:
    model, _ = explored("gemma2")
    skeleton = Skeleton(model.config)
    ids = model.ids()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 60
    first, second = (blockwise(skeleton, model.tensors, x) for x in (ids, changed))
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert float(first.abs().max()) < 3.0  # final_logit_softcapping


def test_calls_fit_any_ids_of_the_shape(explored: Any) -> None:
    model, _ = explored("gemma3")
    skeleton = Skeleton(model.config)
    ids = model.ids()
    expected = blockwise(skeleton, model.tensors, ids)
    calls = skeleton.calls(*ids.shape)
    skeleton.load({n: t for n, t in model.tensors.items() if n in skeleton.shapes})
    with torch.no_grad():
        hidden, _ = skeleton.embed(ids)
        for i in range(len(skeleton.block_names)):
            hidden = skeleton.run(i, hidden, calls)
        got = skeleton.logits(skeleton.finish(hidden))
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="do not fit"):
        skeleton.run(0, hidden[:, :3], calls)


def test_load_casts_and_unload_frees(explored: Any) -> None:
    model, _ = explored("llama_tied_bias")
    skeleton = Skeleton(model.config, dtype=torch.bfloat16)
    name = skeleton.names_of(0)[0]
    skeleton.load({name: model.tensors[name]})
    assert skeleton.tensor(name).dtype == torch.bfloat16
    assert skeleton.tensor(name).device.type == "cpu"
    skeleton.unload([name])
    assert skeleton.tensor(name).device.type == "meta"
    skeleton.load({skeleton.head: model.tensors[skeleton.head]})
    assert skeleton.head_module.weight is skeleton.model.get_input_embeddings().weight  # tied: one tensor


def test_load_refuses_what_does_not_fit(explored: Any) -> None:
    model, _ = explored("llama")
    skeleton = Skeleton(model.config)
    name = skeleton.names_of(0)[0]
    with pytest.raises(SourceError, match="no tensor 'nonsense'"):
        skeleton.load({"nonsense": torch.zeros(1)})
    with pytest.raises(SourceError, match=f"'{name}' has shape"):
        skeleton.load({name: torch.zeros(3, 3)})


def test_float32_is_kept_where_the_model_insists(explored: Any) -> None:
    model, _ = explored("deepseek_v3")
    skeleton = Skeleton(model.config, dtype=torch.bfloat16)
    bias = next(n for n in skeleton.shapes if n.endswith("e_score_correction_bias"))
    assert skeleton.dtype_of(bias) == torch.float32
    assert skeleton.dtype_of(skeleton.head) == torch.bfloat16


def test_experts_of_unknown_form_stay_whole_and_are_named() -> None:
    config = tf.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    skeleton = Skeleton(config)
    assert any("3-D tensors" in note for note in skeleton.notes)
    assert any(len(shape) == 3 for shape in skeleton.shapes.values())


def test_no_memory_and_no_time_for_parameters() -> None:
    code = """
import time, torch
from transformers import LlamaConfig, LlamaForCausalLM
from lilliput.anatomy.skeleton import Skeleton
def peak():
    return next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM'))
shape = dict(num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)
Skeleton(LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, **shape, pad_token_id=0))
before = peak()
Skeleton(LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, **shape))
grown = peak() - before
began = time.process_time()
Skeleton(LlamaConfig(num_hidden_layers=32))
print(grown, time.process_time() - began)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, seconds = map(float, done.stdout.split()[-2:])
    assert grown < 8 * 1024  # KiB; the parameters would be 2.4 GB in bfloat16
    assert seconds < 2


def test_positions_are_those_that_the_config_names() -> None:
    assert positions(tf.GPT2Config(n_positions=64)) == 64
    assert positions(tf.LlamaConfig(max_position_embeddings=96)) == 96
    assert positions(tf.BloomConfig()) is None  # its positions are slopes: no limit is named
