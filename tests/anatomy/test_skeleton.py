"""The skeleton against the real transformers models."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.anatomy.skeleton import Skeleton
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
