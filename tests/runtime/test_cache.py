import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from lilliput.errors import SourceError
from lilliput.runtime.cache import CachedModel

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
IDS = torch.arange(1, 21).view(2, 10)


def llama():
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **SMALL))


def mamba():
    return MambaForCausalLM(MambaConfig(num_hidden_layers=2, state_size=4, **SMALL))


@pytest.mark.parametrize("make", [llama, mamba])
def test_pieces_give_what_one_pass_gives(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        cached = CachedModel(model)
        for _ in range(2):  # the second start forgets the first
            outs = [cached.start(IDS[:, :6]), *(cached.step(IDS[:, i : i + 1]) for i in range(6, 10))]
            torch.testing.assert_close(torch.cat([x.logits for x in outs], 1), whole, rtol=1e-4, atol=1e-5)


def test_without_what_is_kept_the_rest_is_another():
    torch.manual_seed(0)
    model = llama().eval()
    with torch.no_grad():
        cached = CachedModel(model)
        cached.start(IDS[:, :6])
        assert not torch.allclose(cached.step(IDS[:, 6:]).logits, model(input_ids=IDS[:, 6:]).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("taken", "given"), [("past_key_values", "past_key_values"), ("past_key_values", "cache"), ("cache", "cache")]
)
def test_every_pair_of_names(taken, given):
    """The names before and after transformers 5.24, and a model of its own code for the old name under the new one."""
    calls = []

    def forward(input_ids, use_cache, past_key_values=None):
        calls.append(past_key_values)
        return {given: len(calls)}

    def renamed(input_ids, use_cache, cache=None):
        return forward(input_ids, use_cache, cache)

    chosen = renamed if taken == "cache" else forward
    model = type("Own", (), {"forward": staticmethod(chosen), "__call__": lambda _, **given: chosen(**given)})()
    cached = CachedModel(model)
    for read in (cached.start, cached.step, cached.step, cached.start):
        read(IDS)
    assert calls == [None, 1, 2, None]


def gpt():
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def rwkv():
    """Its state mixes the sequences of a batch in transformers."""
    return RwkvForCausalLM(RwkvConfig(num_hidden_layers=2, attention_hidden_size=16, **SMALL))


@pytest.mark.parametrize("make", [gpt, rwkv])
def test_refuses_a_model_that_cannot_go_on(make):
    model = make()
    with pytest.raises(SourceError, match=f"{type(model).__name__} cannot go on"):
        CachedModel(model)


def test_refuses_a_cache_that_is_something_else():
    xlm = XLMWithLMHeadModel(XLMConfig(vocab_size=32, emb_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16))
    cached = CachedModel(xlm.eval())
    with torch.no_grad(), pytest.raises(SourceError, match="XLMWithLMHeadModel cannot go on"):
        cached.start(IDS)
