"""The streamed gradients against whole-model autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
from lilliput.streaming.backward import Samples, backward, loss

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
MAKES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SHAPE),
    "tied, capped logits, scaled embedding": lambda: tf.Gemma2Config(
        **(SHAPE | {"tie_word_embeddings": True}), head_dim=4, query_pre_attn_scalar=4, final_logit_softcapping=3.0
    ),
    "layer norm, biases, Conv1D": lambda: tf.GPT2Config(
        vocab_size=48, n_embd=16, n_layer=3, n_head=4, n_positions=32, tie_word_embeddings=False
    ),
}


def whole(make: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(make()).float().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    return model, {n: p.detach() for n, p in model.named_parameters()}


def cross_entropy(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_loss_and_gradients_are_those_of_the_whole_model(make: Callable[[], Any], tmp_path: Path) -> None:
    model, tensors = whole(make)
    skeleton = Skeleton(make())
    ids = torch.randint(1, 48, (3, 9))
    out = cross_entropy(model, ids)
    out.backward()
    value = out.item()
    expected = {n: p.grad for n, p in model.named_parameters()}
    samples = Samples(ids, tmp_path)
    read = tensors.__getitem__

    assert loss(skeleton, read, samples) == pytest.approx(value, rel=1e-5)
    seen: list[int | None] = []
    for part in backward(skeleton, read, samples):
        seen.append(part.block)
        assert part.loss == pytest.approx(value, rel=1e-5)
        outside = {*skeleton.final, *(() if skeleton.tied else (skeleton.head,))}
        names = set(part.tensors) - set(skeleton.embeddings)  # a tied head's is not the embedding's whole gradient
        assert names == (outside if part.block is None else set(skeleton.names_of(part.block)))
        for name in names:
            torch.testing.assert_close(part.tensors[name], expected[name], rtol=1e-4, atol=1e-6)
    assert seen == [None, 2, 1, 0]
    assert not list(tmp_path.iterdir())
    assert all(skeleton.tensor(n).is_meta for n in skeleton.shapes)


def test_the_gradient_that_reaches_block_0_is_the_embeddings(tmp_path: Path) -> None:
    model, tensors = whole(MAKES["llama"])
    skeleton = Skeleton(MAKES["llama"]())
    ids = torch.randint(1, 48, (2, 7))
    cross_entropy(model, ids).backward()
    got = torch.zeros(48, 16)
    for part in backward(skeleton, tensors.__getitem__, Samples(ids, tmp_path)):
        if part.block == 0:
            got.index_add_(0, ids.flatten(), part.hidden.read(0, 2).reshape(-1, 16))
    torch.testing.assert_close(got, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)


def test_squares_are_those_of_each_sample_alone(tmp_path: Path) -> None:
    model, tensors = whole(MAKES["llama"])
    ids = torch.randint(1, 48, (3, 6))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = torch.zeros_like(tensors[name])
    for row in ids:
        model.zero_grad()
        (cross_entropy(model, row[None]) / 3).backward()
        expected += model.get_parameter(name).grad ** 2
    parts = backward(Skeleton(MAKES["llama"]()), tensors.__getitem__, Samples(ids, tmp_path), squares=True)
    got = next(part.squares[name] for part in parts if part.block == 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-9)
    parts.close()
    assert not list(tmp_path.iterdir())


def test_logits_go_through_the_head_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors = whole(MAKES["llama"])
    skeleton = Skeleton(MAKES["llama"]())
    samples = Samples(torch.randint(1, 48, (2, 11)), tmp_path)
    at_once = next(backward(skeleton, tensors.__getitem__, samples))
    monkeypatch.setattr("lilliput.streaming.backward.LOGITS", 4 * 48)
    sliced = next(backward(skeleton, tensors.__getitem__, samples))
    assert sliced.loss == pytest.approx(at_once.loss, rel=1e-6)
    for name, value in at_once.tensors.items():
        torch.testing.assert_close(sliced.tensors[name], value, rtol=1e-4, atol=1e-7)


def test_an_expert_without_tokens_has_a_zero_gradient(tmp_path: Path) -> None:
    config = tf.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=1)
    skeleton = Skeleton(config)
    rng = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=rng) for n, s in skeleton.shapes.items()}
    ids = torch.randint(1, 48, (1, 2))
    for part in backward(skeleton, tensors.__getitem__, Samples(ids, tmp_path)):
        experts = [n for n in part.tensors if ".experts." in n]
        if experts:
            silent = [n for n in experts if not part.tensors[n].any()]
            assert 0 < len(silent) < len(experts)
            assert all(bool(torch.isfinite(x).all()) for x in part.tensors.values())
