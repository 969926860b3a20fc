"""The rotation between two embeddings: found where there is one, and not where there is none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lilliput.algebra.rotations import orthogonal
from lilliput.attribution.turn import _rotation, turned_like
from lilliput.model.rotated import RotatedModel
from lilliput.model.stored import open_model


def table(values: Tensor) -> Any:
    """What the search reads of a model."""
    read = SimpleNamespace(read_rows=lambda _, start, stop: values[start:stop])
    return SimpleNamespace(
        base=read,
        read_rows=read.read_rows,
        shape=lambda _: tuple(values.shape),
        outside=SimpleNamespace(embeddings=("embed",)),
        skeleton=SimpleNamespace(hidden_size=values.shape[1]),
    )


def embedding(rows: int = 5000, width: int = 24) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_the_rotation_is_recovered(dtype: torch.dtype, off: float) -> None:
    wanted = orthogonal(24, 1)
    found = _rotation(table((embedding().double() @ wanted).to(dtype)), table(embedding()))
    assert found is not None
    assert float((found - wanted).abs().max()) < off
    assert float((found.T @ found - torch.eye(24, dtype=torch.float64)).abs().max()) < 1e-12


def test_what_is_no_rotation_is_not_taken_for_one() -> None:
    turned = (embedding().double() @ orthogonal(24, 1)).float()
    assert _rotation(table(1.05 * turned), table(embedding())) is None
    assert _rotation(table(turned.flip(0)), table(embedding())) is None
    # Fewer tokens than channels do not say where every direction went.
    assert _rotation(table(turned[:20]), table(embedding()[:20])) is None
    assert _rotation(table(turned * torch.nan), table(embedding())) is None


def test_what_cannot_be_rotated_stays(tiny) -> None:
    model = open_model(str(tiny("gpt2")))
    assert turned_like(model, model) is None


def test_an_exact_model_does_not_round_what_lies_outside_the_blocks(llama) -> None:
    model = open_model(str(llama()))
    matrix, head = orthogonal(64, 2), model.skeleton.head
    inner = model.source.read
    model.source.read = lambda name, rows=None: inner(name, rows).bfloat16()  # type: ignore[method-assign]
    bases = [matrix] * (len(model.skeleton.block_names) + 1)
    rounded, exact = RotatedModel(model, bases), RotatedModel(model, bases, exact=True)
    assert rounded.read(head).dtype == rounded.read_rows(head, 0, 8).dtype == torch.bfloat16
    assert exact.read(head).dtype == exact.read_rows(head, 0, 8).dtype == torch.float32
    assert torch.equal(exact.read(head).bfloat16(), rounded.read(head))
