from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lilliput.anatomy.model import Link
from lilliput.errors import LilliputError
from lilliput.folds.kinds import PermuteFold, ScaleFold
from lilliput.model.block import BlockWeights
from lilliput.model.stored import Model, open_model

Tiny = Callable[[str], Path]


def block(tiny: Tiny, name: str) -> tuple[Model, BlockWeights]:
    model = open_model(str(tiny(name)))
    return model, BlockWeights(model, 1, model.anatomy().blocks[1])


def scales(link: Link) -> Tensor:
    torch.manual_seed(0)
    return link.tie(torch.rand(len(link.index)) + 0.5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "neox", "mixtral"])
def test_folds_keep_what_the_block_computes(tiny: Tiny, name: str) -> None:
    model, weights = block(tiny, name)
    skeleton = model.skeleton
    hidden, calls = _embed(model)
    model.load_block(1)
    with torch.no_grad():
        before = skeleton.run(1, hidden, calls)
        factors = weights.fold([ScaleFold(link, scales(link)) for link in weights.anatomy.links])
        skeleton.load({weights.canonical(n): weights.tensor(n) for n in weights.names()})
        after = skeleton.run(1, hidden, calls)
    assert weights.anatomy.links
    assert any(weights.folded(n) for n in weights.names())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    readers = {name for link in weights.anatomy.links for name in link.readers}
    assert factors.keys() == {x.site for x in weights.anatomy.linears if x.name in readers}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "neox", "mixtral"])
def test_another_order_of_hidden_channels_keeps_what_the_block_computes(tiny: Tiny, name: str) -> None:
    model, weights = block(tiny, name)
    skeleton = model.skeleton
    hidden, calls = _embed(model)
    model.load_block(1)
    draw = torch.Generator().manual_seed(0)
    channels = weights.anatomy.groups.channels
    assert channels
    with torch.no_grad():
        before = skeleton.run(1, hidden, calls)
        for _ in range(2):
            weights.fold([ScaleFold(link, scales(link)) for link in weights.anatomy.links])
            weights.fold([PermuteFold(x, torch.randperm(x.width, generator=draw)) for x in channels])
        skeleton.load({weights.canonical(n): weights.tensor(n) for n in weights.names()})
        after = skeleton.run(1, hidden, calls)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    plain = BlockWeights(model, 1, weights.anatomy)
    for x in channels:
        down = weights.anatomy.linear(x.readers[0])
        assert not torch.equal(weights.linear(down), plain.linear(down))
    with pytest.raises(LilliputError, match="gave no order"):
        weights.fold([PermuteFold(channels[0], torch.zeros(channels[0].width, dtype=torch.int64))])


def test_squared_gradients_follow_the_channels(tiny: Tiny) -> None:
    _, weights = block(tiny, "llama")
    channels = weights.anatomy.groups.channels[0]
    order = torch.arange(channels.width).flip(0)
    weights.fold([PermuteFold(channels, order)])
    down = weights.anatomy.linear(channels.readers[0])
    squares = torch.rand(down.out_features, down.in_features)
    assert torch.equal(weights.through_folds(down, squares), squares[:, order])


def _embed(model: Model) -> tuple[Tensor, object]:
    model.load(model.skeleton.embeddings)
    with torch.no_grad():
        return model.skeleton.embed(torch.arange(24).reshape(2, 12))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_untouched_tensors_are_those_of_the_file(tiny: Tiny, name: str) -> None:
    model, weights = block(tiny, name)
    for tensor in weights.names():
        assert torch.equal(weights.tensor(tensor), model.read(weights.canonical(tensor)))
        assert not weights.folded(tensor)
    linear = weights.anatomy.linears[0]
    value = weights.linear(linear)
    assert value.shape == (linear.out_features, linear.in_features)
    assert value.is_contiguous()
    assert torch.equal(weights.to_stored(linear, value), model.read(weights.canonical(f"{linear.name}.weight")).float())
    value.zero_()
    assert float(weights.linear(linear).abs().max()) > 0  # the caller's own copy


def test_two_folds_on_one_linear_multiply(tiny: Tiny) -> None:
    _, once = block(tiny, "llama")
    _, twice = block(tiny, "llama")
    link = once.anatomy.links[0]
    s = scales(link)
    a = once.fold([ScaleFold(link, s * s)])
    twice.fold([ScaleFold(link, s)])
    twice.fold([ScaleFold(link, s)])
    for name in once.names():
        torch.testing.assert_close(twice.tensor(name).float(), once.tensor(name).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a[link.site], 1 / (s * s))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_scales(tiny: Tiny, value: float) -> None:
    _, weights = block(tiny, "llama")
    link = weights.anatomy.links[0]
    s = scales(link)
    s[3] = value
    with pytest.raises(LilliputError, match="unusable scales"):
        weights.fold([ScaleFold(link, s)])


def test_heads_that_share_a_row_share_a_scale(tiny: Tiny) -> None:
    _, weights = block(tiny, "llama")
    link = next(x for x in weights.anatomy.links if len(x.index.unique()) < len(x.index))
    with pytest.raises(LilliputError, match="share a row"):
        weights.fold([ScaleFold(link, torch.linspace(1, 2, len(link.index)))])
