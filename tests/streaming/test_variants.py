"""Changed models side by side, against each of them run by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lilliput.model.stored import Model, open_model
from lilliput.streaming.divergence import divergences
from lilliput.streaming.forward import embed
from lilliput.streaming.states import Activations
from lilliput.streaming.variants import Changes, Variants, advance

IDS = torch.randint(0, 48, (2, 7), generator=torch.Generator().manual_seed(0))
ALONE, WHOLE = (0.5, 3.0), (1.0, 2.0)


def _groups(model: Model, block: int) -> list[list[str]]:
    prefix = model.skeleton.block_names[block]
    return [
        [f"{prefix}.self_attn.q_proj.weight", f"{prefix}.self_attn.k_proj.weight"],
        [f"{prefix}.mlp.up_proj.weight"],
    ]


def _changed(model: Model, name: str) -> torch.Tensor:
    noise = torch.randn(model.shape(name), generator=torch.Generator().manual_seed(len(name)))
    return model.read(name) + 0.05 * noise


def _slow(model: Model, folder: Path, factors: dict[str, float]) -> torch.Tensor:
    """The whole model in transformers with changed weights: log-probabilities [samples, tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in whole.named_parameters():
            if name in factors:
                value.add_(factors[name] * (_changed(model, name) - value))
        found: torch.Tensor = whole(IDS).logits.log_softmax(-1)
    return found


def test_they_are_what_each_changed_model_is_by_itself(noisy: Callable[[int], Path], tmp_path: Path) -> None:
    folder = noisy(0)
    model = open_model(str(folder), dtype=torch.float32)
    blocks = len(model.skeleton.block_names)
    first = 1 + len(WHOLE)
    shape = (IDS.shape[1], model.skeleton.hidden_size)
    states = Activations(tmp_path / "0", (first * len(IDS), *shape), torch.float32, create=True)
    calls = embed(model, IDS, 1, states).calls[1]
    before = Variants(states, len(IDS))
    for variant in range(1, first):
        for sample in range(len(IDS)):
            before.write(variant, sample, before.read(0, sample))
    for block in range(blocks):
        groups = _groups(model, block)
        rows = (before.count + len(groups)) * len(IDS)
        after = Variants(Activations(tmp_path / f"{block + 1}", (rows, *shape), torch.float32, create=True), len(IDS))
        model.load_block(block)
        kept = {name: model.skeleton.tensor(name).clone() for name in model.skeleton.names_of(block)}
        with torch.no_grad():
            advance(
                model.skeleton, block, calls, before, after,
                Changes(model.read, lambda name: _changed(model, name), groups, ALONE, WHOLE),
            )  # fmt: skip
        assert all(torch.equal(model.skeleton.tensor(name), value) for name, value in kept.items())
        model.unload_block(block)
        before = after
    found = divergences(model.skeleton, model.read, before)

    every = [_groups(model, block) for block in range(blocks)]
    wanted = [{name: x for groups in every for group in groups for name in group} for x in WHOLE]
    wanted += [dict.fromkeys(group, x) for groups in every for group, x in zip(groups, ALONE, strict=True)]
    original = _slow(model, folder, {})
    slow = [float((original.exp() * (original - _slow(model, folder, factors))).sum(-1).mean()) for factors in wanted]
    assert found == pytest.approx(slow, rel=2e-3, abs=1e-6)
    assert min(slow) > 1e-5
