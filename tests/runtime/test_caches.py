"""Compressed caches inside transformers' own generation: padding, beams, cuts, continuation, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lilliput.anatomy import cached
from lilliput.anatomy.skeleton import Skeleton
from lilliput.errors import LilliputError, SourceError
from lilliput.runtime import caches
from lilliput.runtime.caches import Entry
from lilliput.runtime.caches.codec import CodecSpec
from lilliput.runtime.caches.fp8 import Fp8Spec
from lilliput.runtime.caches.hooks import attention_of
from lilliput.runtime.caches.kivi import KiviSpec
from lilliput.runtime.caches.kvquant import KvquantSpec
from lilliput.runtime.caches.layer import CompressedLayer
from lilliput.runtime.caches.look import shape_of
from lilliput.runtime.caches.per_token import PerTokenSpec
from lilliput.runtime.caches.shifted import ShiftedSpec
from lilliput.runtime.caches.turns import rotation
from lilliput.runtime.caches.window import WindowSpec

_SIZES = {"vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_SIZES, num_hidden_layers=2, intermediate_size=64, num_key_value_heads=2),
    "qwen2": lambda: tf.Qwen2Config(**_SIZES, num_hidden_layers=2, intermediate_size=64, num_key_value_heads=2),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=1
    ),
    # The first of two layers sees a window, the second everything.
    "gemma2": lambda: tf.Gemma2Config(
        **_SIZES, num_hidden_layers=2, intermediate_size=64, num_key_value_heads=2, head_dim=16, sliding_window=8
    ),
    "neox": lambda: tf.GPTNeoXConfig(**_SIZES, num_hidden_layers=2, intermediate_size=64, rotary_pct=0.5),
}
WHOLE = [PerTokenSpec(16, 16, 16), KiviSpec(16, 16, 16, 16), WindowSpec(2, 500), ShiftedSpec(16, 16, 16)]
FINE = [PerTokenSpec(8, 8, 8), KiviSpec(8, 8, 8, 16), ShiftedSpec(8, 8, 8), KvquantSpec(8, 8, 0.1, 2)]
COARSE = [PerTokenSpec(2, 2, 16), KiviSpec(2, 2, 8, 8), ShiftedSpec(2, 2, 8), KvquantSpec(2, 2, 0.0, 1)]
Make = Callable[..., Any]


def label(x: CodecSpec) -> str:
    return f"{x.kind}{getattr(x, 'bits', '')}"


@pytest.fixture(scope="module")
def plain() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            torch.manual_seed(0)
            model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(5.0) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.02)
            model.generation_config.pad_token_id = 0
            model.generation_config.eos_token_id = None
            made[name] = model
        return made[name]

    return make


@pytest.fixture
def compressed(plain: Callable[[str], Any]) -> Make:
    """A copy of a model whose full-attention layers store their cache as a spec says."""

    def make(name: str, spec: CodecSpec) -> Any:
        model = copy.deepcopy(plain(name))
        skeleton = Skeleton(model.config)
        blocks = [n for i, n in enumerate(skeleton.block_names) if not (name == "gemma2" and i == 0)]
        block = len(skeleton.block_names) - 1
        attention = attention_of(skeleton.block(block))
        if isinstance(spec, KvquantSpec):
            turned = rotation(skeleton.block(block).get_submodule(attention)) is not None
            spec = KvquantSpec(spec.bits, spec.value_bits, spec.outliers, spec.sinks, turned)
        shape = shape_of(skeleton, block)
        fixed = {
            n: torch.ones(s) * (2.0 if "scale" in n or "half" in n else 0.0) for n, (_, s) in spec.stored(shape).items()
        }
        for n in fixed:
            if n.endswith("levels"):
                fixed[n] = torch.linspace(-1, 1, fixed[n].shape[1]).expand(2, -1).clone()
        entry = Entry(spec, tuple(blocks), attention, shape)
        caches.install(model, [entry.plain()], lambda full: fixed[full.rpartition(".")[2]])
        return model

    return make


def ids(tokens: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(2, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, x: Tensor, **options: Any) -> Any:
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options.setdefault("attention_mask", torch.ones_like(x))
    return model.generate(x, **{**settings, **options})


def padded(x: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """The second sequence is `left` tokens shorter."""
    out, mask = x.clone(), torch.ones_like(x)
    out[1, :left], mask[1, :left] = 0, 0
    return out, mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spec", WHOLE, ids=label)
def test_sixteen_bits_are_the_plain_cache(plain: Make, compressed: Make, name: str, spec: CodecSpec) -> None:
    x, mask = padded(ids(21), 6)
    expected = generate(plain(name), x, attention_mask=mask)
    found = generate(compressed(name, spec), x, attention_mask=mask)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    kinds = [type(layer).__name__ for layer in found.cache.layers]
    assert kinds == (["DynamicSlidingWindowLayer"] if name == "gemma2" else ["CompressedLayer"]) + ["CompressedLayer"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spec", FINE, ids=label)
def test_eight_bits_are_close(plain: Make, compressed: Make, name: str, spec: CodecSpec) -> None:
    x, mask = padded(ids(21), 6)
    expected = generate(plain(name), x, attention_mask=mask, max_new_tokens=2)
    found = generate(compressed(name, spec), x, attention_mask=mask, max_new_tokens=2)
    away = (torch.stack(found.logits) - torch.stack(expected.logits)).norm() / torch.stack(expected.logits).norm()
    # Static ranges of these tests are not the model's: what is beyond them is kept apart, as far as that goes.
    assert away < (0.5 if spec.kind == "kvquant" else 0.05)
    assert away > 0


@pytest.mark.parametrize("spec", [*COARSE[:1], *COARSE[2:]], ids=label)
def test_padding_changes_no_other_sequence_and_not_its_own(compressed: Make, spec: CodecSpec) -> None:
    """Where a token is rounded by itself, padding cannot be seen; its first real tokens stay plain."""
    model, x = compressed("llama", spec), ids(20)
    together = generate(model, *padded(x, 7)[:1], attention_mask=padded(x, 7)[1])
    first = generate(model, x[:1])
    second = generate(model, x[1:, 7:])
    for number, alone in enumerate((first, second)):
        ours = torch.stack(together.logits)[:, number]
        torch.testing.assert_close(ours, torch.stack(alone.logits)[:, 0], rtol=1e-3, atol=1e-3)


def test_each_padded_sequence_has_its_own_sinks(compressed: Make) -> None:
    model, x = compressed("llama", WindowSpec(3, 6)), ids(20)
    together = generate(model, padded(x, 7)[0], attention_mask=padded(x, 7)[1])
    for number, alone in enumerate((generate(model, x[:1]), generate(model, x[1:, 7:]))):
        ours = torch.stack(together.logits)[:, number]
        torch.testing.assert_close(ours, torch.stack(alone.logits)[:, 0], rtol=1e-3, atol=1e-3)
    layer = together.cache.layers[0]
    assert layer.codec.parts[2].tolist() == [[0, 1, 2, *range(24, 30)], [7, 8, 9, *range(24, 30)]]  # one waits


def test_what_left_a_window_is_not_seen(plain: Make, compressed: Make) -> None:
    """Logits are those of a full cache under a mask that hides the same tokens."""
    model, x = compressed("llama", WindowSpec(2, 5)), ids(16, batch=1)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(x, use_cache=True, **{_name(model): cache})
        found = model(x[:, :1], use_cache=True, **{_name(model): cache}).logits
        full = DynamicCache(config=model.config)
        plain("llama")(x, use_cache=True, **{_name(model): full})
        for layer in full.layers:
            keep = [0, 1, *range(11, 16)]
            layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
        expected = plain("llama")(
            x[:, :1], use_cache=True, position_ids=torch.tensor([[16]]), **{_name(model): full}
        ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _name(model: Any) -> str:
    from lilliput.anatomy.cached import argument

    name = argument(model.forward)
    assert name is not None
    return name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spec", [WHOLE[0], WHOLE[1], COARSE[3]], ids=label)
def test_beams_follow_their_sequences(plain: Make, compressed: Make, name: str, spec: CodecSpec) -> None:
    x, mask = padded(ids(18), 5)
    model = compressed(name, spec)
    found = model.generate(x, attention_mask=mask, num_beams=3, max_new_tokens=8, do_sample=False)
    assert found.shape == (2, 26)
    if spec.kind != "kvquant":
        expected = plain(name).generate(x, attention_mask=mask, num_beams=3, max_new_tokens=8, do_sample=False)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", [*WHOLE, *COARSE, WindowSpec(2, 7)], ids=label)
def test_assisted_decoding_says_what_plain_decoding_says(plain: Make, compressed: Make, spec: CodecSpec) -> None:
    """Rejected tokens are cut off the cache, and leave no trace where past states are recorded."""
    model, assistant, x = compressed("llama", spec), plain("llama"), ids(19, batch=1)
    alone = generate(model, x, max_new_tokens=20)
    helped = generate(model, x, max_new_tokens=20, assistant_model=assistant)
    if not model_is_past_only(spec) or spec in WHOLE:
        assert torch.equal(helped.sequences, alone.sequences)
    assert helped.sequences.shape == alone.sequences.shape
    cache = helped.cache
    layer = cache.layers[0]
    assert isinstance(layer, CompressedLayer)
    assert layer.get_seq_length() >= 38


def model_is_past_only(spec: CodecSpec) -> bool:
    return spec.kind in ("kivi", "wkvquant", "sink-window")


@pytest.mark.parametrize("spec", [*COARSE, WindowSpec(2, 7)], ids=label)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_cut_of_the_latest_call_leaves_no_trace(compressed: Make, spec: CodecSpec, recorded: bool) -> None:
    model, x = compressed("llama", spec), ids(30)
    name = _name(model)
    one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for cache in (one, other):
            model(x[:, :20], use_cache=True, **{name: cache})
            if recorded:
                cache.activate_past_recording()
        model(x[:, 20:26], use_cache=True, **{name: one})
        one.crop(-4)
        model(x[:, 20:22], use_cache=True, **{name: other})
        other.crop(0)
        assert one.get_seq_length() == other.get_seq_length() == 22
        for a, b in zip(one.layers, other.layers, strict=True):
            for left, right in zip(a.codec.materialise(), b.codec.materialise(), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [*COARSE, WindowSpec(2, 7)], ids=label)
def test_a_conversation_goes_on_and_begins_anew(compressed: Make, spec: CodecSpec) -> None:
    model, x = compressed("llama", spec), ids(24)
    name = _name(model)
    with torch.no_grad():
        whole = model(x, use_cache=True)
        cache = DynamicCache(config=model.config)
        for part in x.split([10, 1, 13], dim=1):
            last = model(part, use_cache=True, **{name: cache}).logits
        if not model_is_past_only(spec):
            torch.testing.assert_close(last[:, -1], whole.logits[:, -1], rtol=1e-3, atol=1e-3)
        cache.batch_repeat_interleave(2)
        assert cache.layers[0].codec.materialise()[0].shape[0] == 4
        cache.batch_select_indices(torch.tensor([0, 3]))
        assert cache.layers[0].batch_size == 2
        again = model(x[:, :1], use_cache=True, **{name: cache}).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        fresh = model(x, use_cache=True, **{name: cache}).logits
    assert torch.isfinite(again).all()
    torch.testing.assert_close(fresh, whole.logits, rtol=1e-4, atol=1e-4)


def test_rotations_are_stored_once_for_all_layers_and_sequences(compressed: Make) -> None:
    out = generate(compressed("llama", COARSE[3]), ids(20))
    table = out.cache.__dict__["lilliput_turns"]
    assert table.cos.shape == (31, 16)
    assert out.cache.layers[0].codec.index.dtype == torch.int32
    assert torch.equal(out.cache.layers[1].codec.index, torch.arange(31, dtype=torch.int32).expand(2, -1))


def test_other_caches_are_refused(compressed: Make) -> None:
    model, x = compressed("llama", WHOLE[0]), ids(9)
    with pytest.raises(LilliputError, match=r"StaticLayer.*leave `cache_implementation` out"):
        generate(model, x, cache_implementation="static")
    name = _name(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), caches.paused(model):
        model(x, use_cache=True, **{name: cache})
    with torch.no_grad(), pytest.raises(LilliputError, match="tokens that were not compressed"):
        model(x, use_cache=True, **{name: cache})
    assert StaticCache is not None


def test_damaged_and_unknown_entries_are_refused(plain: Make) -> None:
    entry = {
        "kind": "kivi",
        "bits": 4,
        "value_bits": 4,
        "shape": [2, 16, 16],
        "attention": "self_attn",
        "blocks": ["x"],
    }
    with pytest.raises(SourceError, match="stores its cache as 'later'"):
        caches.parsed([entry | {"kind": "later"}])
    with pytest.raises(SourceError, match="'caches' of quantization_config is damaged"):
        caches.parsed([entry | {"bytes": 4}])
    with pytest.raises(SourceError, match=r"'x\.self_attn' a compressed cache, and the model has no such attention"):
        caches.install(plain("llama"), [entry | {"group_size": 16}], {}.__getitem__)


@pytest.mark.parametrize("name", ["llama", "qwen2", "neox"])
def test_keys_are_turned_back_to_what_they_were(plain: Make, name: str) -> None:
    from lilliput.runtime.caches.turns import undo

    model = plain(name)
    skeleton = Skeleton(model.config)
    attention = skeleton.block(0).get_submodule(attention_of(skeleton.block(0)))
    rotate = rotation(attention)
    assert rotate is not None
    cos, sin = skeleton.calls(1, 11).layers[0].kwargs["position_embeddings"]
    keys = torch.randn(2, 2, 11, 16)
    turned = rotate(keys, cos, sin)
    assert not torch.allclose(turned, keys)
    torch.testing.assert_close(undo(turned, cos, sin, rotate), keys, rtol=1e-5, atol=1e-5)
    scaled = rotate(keys, cos * 1.3, sin * 1.3)
    torch.testing.assert_close(undo(scaled, cos * 1.3, sin * 1.3, rotate), keys, rtol=1e-5, atol=1e-5)
    assert rotation(plain("gpt2").transformer.h[0].attn) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tf.GPTJConfig(vocab_size=96, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=64), "by no function"),
        (
            tf.DeepseekV3Config(
                **_SIZES, num_hidden_layers=1, num_key_value_heads=4, intermediate_size=64, q_lora_rank=16,
                kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1,
            ),
            "what keys are made of",
        ),
    ],
    ids=["gptj", "deepseek"],
)  # fmt: skip
def test_keys_that_cannot_be_turned_back_are_refused(config: Any, words: str) -> None:
    block = Skeleton(config).block(0)
    with pytest.raises(SourceError, match=words):
        rotation(block.get_submodule(attention_of(block)))


def test_layers_with_states_have_no_growing_cache() -> None:
    config = tf.JambaConfig(
        vocab_size=96, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=64, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
    )  # fmt: skip
    assert cached.kinds(config) == ("LinearAttentionLayer", cached.PLAIN)
    cache = cached.filled(config, 1, 5)
    assert cache.layers[1].get_seq_length() == 5


@pytest.mark.parametrize("spec", [*COARSE[:2], Fp8Spec()], ids=label)
def test_a_library_that_drops_keys_by_hooks_is_told_why_not(compressed: Make, plain: Make, spec: CodecSpec) -> None:
    """As kvpress does: after a prompt an attention's keys and values are read from the cache, and fewer put back."""

    def press(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = next(kwargs[x] for x in (*cached.NAMES, *cached.INNER) if kwargs.get(x) is not None)
        layer = cache.layers[module.layer_idx]
        keep = layer.keys.norm(dim=-1).topk(12, dim=-1).indices.sort(-1).values[..., None]
        layer.keys, layer.values = (
            x.gather(2, keep.expand(-1, -1, -1, x.shape[-1])) for x in (layer.keys, layer.values)
        )

    def pressed(model: Any) -> Any:
        cache = DynamicCache(config=model.config)
        handles = [x.self_attn.register_forward_hook(press, with_kwargs=True) for x in model.model.layers]
        try:
            with torch.no_grad():
                model(ids(20), use_cache=True, **{cached.argument(model.forward): cache})
        finally:
            for handle in handles:
                handle.remove()
        return cache

    assert pressed(plain("llama")).layers[0].keys.shape[2] == 12
    model = compressed("llama", spec)
    with pytest.raises(LilliputError, match=r"stored compressed, and something reads or replaces them.*kvpress"):
        pressed(model)
    with caches.paused(model):
        assert pressed(model).layers[0].keys.shape[2] == 12
    layer = CompressedLayer(spec.make(shape_of(Skeleton(model.config), 0), {}))
    for name in ("keys", "values"):
        with pytest.raises(LilliputError, match=f"the {name} of this layer"):
            setattr(layer, name, torch.zeros(1))
