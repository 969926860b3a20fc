"""Any chain of folds leaves the logits as they were, on every layout of norms, heads and experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lilliput.algebra.rotations import orthogonal
from lilliput.anatomy.model import Block
from lilliput.errors import PlanError
from lilliput.folds.kinds import Fold, HeadFold, PermuteFold, ScaleFold, ShiftFold
from lilliput.model.block import BlockWeights
from lilliput.model.rotated import RotatedModel
from lilliput.model.stored import Model, open_model

KINDS = ("scale", "shift", "heads", "order", "rotate")
NAMES = ("llama", "llama_tied_bias", "qwen2", "gemma2", "phi3", "gpt2", "opt", "gpt_neox", "gpt_neox_serial", "bloom",
         "falcon", "falcon_new", "falcon_alibi", "mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2")  # fmt: skip
Opened = Callable[[str], tuple[Model, Tensor]]


@pytest.fixture(scope="module")
def opened(script: Callable[..., ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A random model by the name of its architecture, and its logits; each made once."""
    known: dict[str, tuple[Model, Tensor]] = {}
    anatomy = script("conftest", "tests/anatomy")

    def get(name: str) -> tuple[Model, Tensor]:
        if name not in known:
            folder: Path = tmp_path_factory.mktemp(name)
            anatomy.Random(anatomy.CONFIGS[name]()).model.float().save_pretrained(folder)
            model = open_model(folder)
            known[name] = model, logits(model, [])
        return known[name]

    return get


def folds(block: Block, kind: str, draw: torch.Generator) -> list[Fold]:
    """A fold of a kind wherever the block has a place for one."""
    if kind == "order":
        return [PermuteFold(x, torch.randperm(x.width, generator=draw)) for x in block.groups.channels]
    found: list[Fold] = []
    for link in block.links:
        width = len(link.index)
        if kind == "scale":
            found.append(ScaleFold(link, link.tie(torch.rand(width, generator=draw) + 0.5)))
        elif kind == "shift" and link.shifts:
            found.append(ShiftFold(link, torch.randn(width, generator=draw)))
        elif kind == "heads" and link.head:
            seeds = torch.randint(0, 1 << 30, (len(link.heads()[0]),), generator=draw).tolist()
            found.append(HeadFold(link, torch.stack([orthogonal(link.head, n) for n in seeds])))
    return found


@torch.no_grad()
def logits(model: Model, chain: Sequence[str], seed: int = 0) -> Tensor:
    """Logits [2, 9, vocabulary] after the folds of a chain in every block."""
    skeleton, draw = model.skeleton, torch.Generator().manual_seed(seed)
    model.load(skeleton.embeddings)
    hidden, calls = skeleton.embed(torch.arange(1, 19).view(2, 9))
    for i, name in enumerate(skeleton.block_names):
        weights = BlockWeights(model, i, model.anatomy().blocks[i])
        for kind in chain:
            weights.fold(folds(weights.anatomy, kind, draw))
        skeleton.load({f"{name}.{x}": weights.tensor(x) for x in weights.names()})
        hidden = skeleton.run(i, hidden, calls)
        model.unload_block(i)
    model.load(skeleton.final)
    stem = skeleton.head.rpartition(".")[0]
    model.load([n for n in skeleton.shapes if n.rpartition(".")[0] == stem])
    return skeleton.logits(skeleton.finish(hidden))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    chain=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_a_chain_of_folds_keeps_the_logits(opened: Opened, name: str, chain: list[str], seed: int) -> None:
    model, before = opened(name)
    turned: Model = model
    if "rotate" in chain:  # which happens while the model is read, before any block is folded
        try:
            ready = RotatedModel(model)
        except PlanError:
            ready = None  # its norms do not commute with rotations
        for n in range(chain.count("rotate") if ready is not None else 0):
            ready = ready.rotated(orthogonal(model.skeleton.hidden_size, seed + n))
        turned = model if ready is None else ready
    after = logits(turned, [x for x in chain if x != "rotate"], seed)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))


def test_every_kind_of_fold_has_a_place_and_changes_tensors(opened: Opened) -> None:
    """Norms with biases and without, heads of grouped queries, hidden channels of experts."""
    for name, kinds in {"gpt2": KINDS[:4], "falcon_alibi": KINDS[:3], "mixtral": ("scale", "heads", "order")}.items():
        model, _ = opened(name)
        for kind in kinds:
            weights = BlockWeights(model, 0, model.anatomy().blocks[0])
            weights.fold(folds(weights.anatomy, kind, torch.Generator().manual_seed(0)))
            changed = [x for x in weights.names() if weights.folded(x)]
            assert changed, (name, kind)
            assert all(not torch.equal(weights.tensor(x), model.read(weights.canonical(x))) for x in changed)
