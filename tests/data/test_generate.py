import pytest
import torch
from transformers import LlamaConfig

from lilliput.anatomy.skeleton import Skeleton
from lilliput.data import generate_tokens
from lilliput.errors import DataError

VOCABULARY = 640  # padded past the tokenizer's 600


class Resident:
    """What `generate_tokens` uses of a model: a skeleton, and random weights to put into it."""

    def __init__(self, poison: bool = False) -> None:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        self.skeleton = Skeleton(config)
        self.vocabulary = VOCABULARY
        generator = torch.Generator().manual_seed(0)
        self.weights = {n: torch.randn(s, generator=generator) * 0.3 for n, s in self.skeleton.shapes.items()}
        if poison:
            self.weights["model.norm.weight"][3] = float("nan")

    def load(self, names):
        self.skeleton.load({n: self.weights[n] for n in names})

    def unload(self, names):
        self.skeleton.unload(names)


def test_same_seed_same_text_another_seed_another(tokenizer):
    model = Resident()
    first = generate_tokens(model, tokenizer, 5, 16, seed=7)
    assert first.ids.shape == (5, 16)
    assert first.ids.dtype == torch.int64
    assert first.source == "self"
    assert torch.equal(first.ids, generate_tokens(Resident(), tokenizer, 5, 16, seed=7).ids)
    assert not torch.equal(first.ids, generate_tokens(model, tokenizer, 5, 16, seed=8).ids)
    assert len({tuple(row) for row in first.ids.tolist()}) == 5
    assert all(model.skeleton.tensor(n).is_meta for n in model.skeleton.shapes)


def test_the_batch_size_changes_nothing(tokenizer):
    model = Resident()
    whole = generate_tokens(model, tokenizer, 5, 12, seed=1)
    assert torch.equal(whole.ids, generate_tokens(model, tokenizer, 5, 12, seed=1, batch=2).ids)


def test_begins_with_the_start_token_and_stays_in_the_vocabulary(tokenizer):
    model = Resident()
    free = generate_tokens(model, tokenizer, 40, 8, seed=2).ids
    assert len(set(free[:, 0].tolist())) > 20
    assert not set(free[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert int(free.max()) < len(tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    assert set(generate_tokens(model, tokenizer, 4, 3).ids[:, 0].tolist()) == {tokenizer.bos_token_id}


def test_text_follows_the_models_distribution(tokenizer):
    model = Resident()
    tokenizer.bos_token = "<|endoftext|>"
    start = tokenizer.bos_token_id
    ids = generate_tokens(model, tokenizer, 6_000, 2, seed=3, batch=6_000).ids[:, 1]
    model.load(model.weights)
    with torch.no_grad():
        logits = model.skeleton.model(torch.tensor([[start]])).logits[0, 0, : len(tokenizer)]
    expected = torch.softmax(logits, 0)
    seen = torch.bincount(ids, minlength=len(tokenizer)) / 6_000
    top = expected.topk(5).indices
    spread = (expected * (1 - expected) / 6_000).sqrt()
    assert bool(((seen - expected).abs()[top] < 5 * spread[top]).all())


def test_a_low_temperature_is_greedy(tokenizer):
    model = Resident()
    ids = generate_tokens(model, tokenizer, 2, 6, seed=4, temperature=1e-3).ids
    model.load(model.weights)
    with torch.no_grad():
        best = model.skeleton.model(ids).logits[:, :-1, : len(tokenizer)].argmax(-1)
    assert torch.equal(best, ids[:, 1:])


def test_refuses_what_cannot_be(tokenizer):
    with pytest.raises(DataError, match="not finite at token 1"):
        generate_tokens(Resident(poison=True), tokenizer, 2, 4)
    with pytest.raises(DataError, match="at least 1"):
        generate_tokens(Resident(), tokenizer, 0, 4)
    with pytest.raises(DataError, match="above 0"):
        generate_tokens(Resident(), tokenizer, 1, 4, temperature=0.0)


def test_texts_begin_with_a_random_token_and_the_likeliest(tokenizer):
    model = Resident()
    written = generate_tokens(model, tokenizer, 12, 10, seed=3, greedy=(2, 4)).ids
    assert len(set(written[:, 0].tolist())) > 6
    model.load(tuple(model.skeleton.shapes))
    with torch.no_grad():
        likeliest = model.skeleton.logits(model.skeleton.read(written))[..., : len(tokenizer)].argmax(-1)
    same = written[:, 1:] == likeliest[:, :-1]
    assert bool(same[:, :2].all())
    assert 0 < int(same[:, 2:4].sum()) < 24
    assert not bool(same[:, 4:].all())
    assert torch.equal(written, generate_tokens(model, tokenizer, 12, 10, seed=3, greedy=(2, 4), batch=5).ids)
    with pytest.raises(DataError, match="rise"):
        generate_tokens(model, tokenizer, 2, 4, greedy=(3, 1))
