from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lilliput
from lilliput.efficiency.shapes import Attention, shapes_of
from lilliput.errors import SourceError
from lilliput.model.stored import open_model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mistral", "gpt2"])
def test_operations_are_those_that_torch_counts_in_a_forward_pass(folder, kind, opened):
    tokens = 7
    shapes = shapes_of(opened(folder(kind)))
    model = lilliput.load(folder(kind))
    model.set_attn_implementation("eager")  # whose two products run over all pairs, masked or not
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.int64))
    linears = sum(x.flops for x in shapes.matrices) * tokens
    attention = sum(x.flops(tokens * tokens) for x in shapes.attention)
    # Rotary positions are found by a product of their own: half a head's width, for each token and kind of block.
    positions = sum(v for k, v in counter.get_flop_counts().get("Global", {}).items()) - linears - attention
    assert shapes.notes == ()
    assert 0 <= positions <= 2 * 2 * 16 * tokens
    assert len(shapes.attention) == 2


def test_grouped_queries_and_windows_shrink_the_cache(folder, opened):
    gemma = shapes_of(opened(folder("gemma")))
    assert [x.window for x in gemma.attention] == [8, None]
    # keys and values of 2 heads of width 16, in 2 blocks, the first of which keeps 8 tokens
    assert gemma.cache_bytes(20, 2) == 2 * (64 * 8 + 64 * 20)
    assert shapes_of(opened(folder("mistral"))).cache_bytes(20, 2) == 2 * 2 * 32 * 8
    assert shapes_of(opened(folder("gpt2"))).cache_bytes(20, 2) == 2 * 2 * 64 * 20


def test_pairs_of_a_causal_pass():
    full, windowed = Attention(0, 1, 1, 1, 2), Attention(0, 1, 1, 1, 2, window=3)
    for tokens in (1, 2, 3, 4, 9):
        assert full.pairs(tokens) == sum(range(1, tokens + 1))
        assert windowed.pairs(tokens) == sum(min(t, 3) for t in range(1, tokens + 1))


def test_only_the_chosen_experts_run(folder, opened):
    shapes = shapes_of(opened(folder("mixtral")))
    experts = [x for x in shapes.matrices if x.active < 1]
    assert len(experts) == 2 * 4 * 3
    assert {x.active for x in experts} == {Fraction(1, 2)}
    # 2 of 4 experts of three [32, 48] matrices, in 2 blocks
    assert sum(x.flops for x in experts) == 2 * 2 * 3 * 2 * 32 * 48
    assert not any(x.compressible for x in shapes.matrices if x.role in ("router", "head"))


def test_a_config_that_does_not_say_how_many_experts_run_is_refused(folder):
    model = open_model(str(folder("mixtral")))
    model.anatomy()
    model.skeleton.config.num_experts_per_tok = 0
    with pytest.raises(SourceError, match=r"4 experts.*num_experts_per_tok"):
        shapes_of(model)
