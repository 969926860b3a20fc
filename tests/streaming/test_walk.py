"""The walk over blocks and the collector, against the whole model run at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.errors import LilliputError
from lilliput.model.stored import open_model
from lilliput.streaming.collect import Collector, site_statistics
from lilliput.streaming.forward import through
from lilliput.streaming.walk import Flow, last_hidden, resident, walk

IDS = torch.arange(3 * 8).reshape(3, 8) % 48


def whole(folder: Path) -> tuple[Tensor, ...]:
    """What enters every block, and what leaves the last one before the norm."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return tuple(seen)


def run(folder: Path, place: Path, *, first: int = 0, last: int = 99, recorded: list[int] | None = None) -> list[int]:
    """Walk until block `last`, which is left unfinished; the checksums of what was walked."""
    model = open_model(folder)
    sums: list[int] = []
    with torch.no_grad():
        for passage in walk(model, Flow(IDS, 2, place, "states", torch.float32), first=first, recorded=recorded):
            assert passage.batches is not None
            assert passage.inputs is not None
            for forward in through(model.skeleton, passage.block, passage.batches, passage.inputs, passage.outputs):
                forward()
            if passage.block == last:
                break
            sums += passage.checksum() or []
    return sums


def test_hidden_states_are_those_of_the_whole_model(noisy: Callable[[int], Path], tmp_path: Path) -> None:
    expected = whole(noisy(0))
    model = open_model(noisy(0))
    place = Flow(IDS, 2, tmp_path, "states", torch.float32)
    with torch.no_grad():
        for passage in walk(model, place):
            assert passage.batches is not None
            assert passage.inputs is not None
            assert passage.outputs is not None
            torch.testing.assert_close(passage.inputs.read(0, 3), expected[passage.block], rtol=1e-4, atol=1e-5)
            for forward in through(model.skeleton, passage.block, passage.batches, passage.inputs, passage.outputs):
                forward()
            assert {x.name for x in tmp_path.iterdir()} == {
                place.path(passage.block).name,
                place.path(passage.block + 1).name,
            }
    assert not list(tmp_path.iterdir())
    assert all(model.skeleton.tensor(n).is_meta for n in model.skeleton.shapes)
    states = last_hidden(model, IDS, tmp_path)
    torch.testing.assert_close(states.read(0, 3), expected[-1], rtol=1e-4, atol=1e-5)
    states.delete()


def test_an_interrupted_walk_goes_on_with_the_same_bits(noisy: Callable[[int], Path], tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    expected = run(noisy(0), whole)
    before = run(noisy(0), part, last=1)
    assert before == expected[:1]
    assert run(noisy(0), part, first=1, recorded=before) == expected[1:]
    assert not list(part.iterdir())


def test_states_that_changed_are_refused(noisy: Callable[[int], Path], tmp_path: Path) -> None:
    sums = run(noisy(0), tmp_path, last=1)
    path = tmp_path / "states-0001.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(LilliputError, match="is not what the unfinished run wrote"):
        run(noisy(0), tmp_path, first=1, recorded=sums)
    path.unlink()
    with pytest.raises(LilliputError, match="is missing"):
        run(noisy(0), tmp_path, first=1, recorded=sums)


def test_a_walk_without_states_loads_nothing(noisy: Callable[[int], Path]) -> None:
    model = open_model(noisy(0))
    for n, passage in enumerate(walk(model, None, first=1), start=1):
        assert (passage.block, passage.inputs, passage.checksum()) == (n, None, None)
        assert all(model.skeleton.tensor(x).is_meta for x in model.skeleton.names_of(n))
    assert n == 2


def test_blocks_are_resident_one_by_one(noisy: Callable[[int], Path]) -> None:
    models = open_model(noisy(0)), open_model(noisy(1))
    for block in resident(*models, blocks=range(2, -1, -1)):
        for model in models:
            here = [
                i for i in range(3) if not any(model.skeleton.tensor(x).is_meta for x in model.skeleton.names_of(i))
            ]
            assert here == [block]


def test_statistics_are_those_of_the_inputs_seen(noisy: Callable[[int], Path], tmp_path: Path) -> None:
    model = open_model(noisy(0))
    name = model.skeleton.block_names[1]
    site = model.anatomy().blocks[1].sites[0]
    theirs = tf.AutoModelForCausalLM.from_pretrained(noisy(0), dtype=torch.float32).eval()
    seen: list[Tensor] = []
    theirs.get_submodule(f"{name}.{site.linears[0]}").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        theirs(input_ids=IDS, use_cache=False)
    x = seen[0].reshape(-1, site.width)
    found = site_statistics(model, IDS, tmp_path, frozenset({"gram", "absmax"}), batch=2)[f"{name}.{site.name}"]
    assert found.count == IDS.numel()
    torch.testing.assert_close(found.need("gram"), x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.need("absmax"), x.abs().amax(0), rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_a_site_that_saw_nothing_has_empty_statistics(noisy: Callable[[int], Path]) -> None:
    model = open_model(noisy(0))
    site = model.anatomy().blocks[0].sites[0]
    seen = Collector(model.skeleton, 0, [site], {site.name: frozenset({"square"})})
    x = torch.ones(2, 3, site.width)
    seen.see(site.name, x)
    assert float(seen.take(site.name).need("square").sum()) == 6 * site.width
    assert seen.take(site.name).count == 0  # forgotten
