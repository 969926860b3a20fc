"""Weights beside each other: what counts as a linear, and how often the files are read."""

from collections import Counter

import pytest
import torch

from lilliput.attribution.weights import WeightLoss, compare, is_rotated
from lilliput.model.stored import StoredModel, open_model


def loss(name: str, role: str, linear: bool, cosine: float) -> WeightLoss:
    return WeightLoss(name, 0, role, linear, error=0.1, level=0.0, cosine=cosine, fit=1.0, zeros=0.0, raw=0.0)


def test_linears_are_told_by_what_they_are_and_not_by_their_names(llama) -> None:
    model = open_model(str(llama()))
    found = compare(model, model, 0)
    linears = {f"{model.skeleton.block_names[0]}.{x.name}" for x in model.anatomy().blocks[0].linears}
    assert {x.name for x in found if x.linear} == linears
    assert {x.role for x in found if not x.linear} == {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_norms_have_no_say_in_whether_a_model_is_turned() -> None:
    linears = [loss("h.0.attn.o", "o", True, 0.01), loss("h.0.mlp.up", "up", True, 0.02)]
    norms = [loss(f"h.0.norm{i}.weight", f"norm{i}.weight", False, 1.0) for i in range(3)]
    assert is_rotated(linears + norms)
    assert not is_rotated([loss("h.0.attn.o", "o", True, 0.99), *norms])
    assert not is_rotated([loss("h.0.attn.o", "o", True, float("nan"))])


def test_every_weight_is_read_once(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, base = (open_model(str(llama())) for _ in range(2))
    base.anatomy()
    read: Counter[str] = Counter()
    inner = StoredModel.read

    def counted(self: StoredModel, canonical: str) -> torch.Tensor:
        read[canonical] += self is ours
        return inner(self, canonical)

    monkeypatch.setattr(StoredModel, "read", counted)
    compare(ours, base, 1)
    matrices = [n for n in ours.skeleton.names_of(1) if len(ours.shape(n)) == 2]
    assert {n: read[n] for n in matrices} == dict.fromkeys(matrices, 1)
