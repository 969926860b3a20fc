"""How far other weights move a block's outputs, against the block run by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lilliput.model.stored import open_model
from lilliput.run import running
from lilliput.streaming.forward import embed
from lilliput.streaming.states import Activations

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_movement_is_the_mean_share_of_change_in_a_tokens_output(
    tiny: Tiny, tmp_path: Path, name: str, batch: int
) -> None:
    """Against the block run by itself with the weights in place, on the first two samples, however they are batched."""
    model = open_model(str(tiny(name)), dtype=torch.float32)
    anatomy = model.anatomy().blocks[0]
    ids = torch.randint(0, 512, (8, 16), generator=torch.Generator().manual_seed(0))
    other = (anatomy.linears[0].name, anatomy.linears[-1].name)
    with torch.no_grad(), Activations(tmp_path / "h", (8, 16, 64), torch.float32, create=True) as store:
        batches = embed(model, ids, batch, store)
        model.load_block(0)
        share = running.movement(model, 0, anatomy, batches, store)
        prefix = model.skeleton.block_names[0]
        own = {n: model.read(f"{prefix}.{n}.weight") for n in other}
        turned = {x.name for x in anatomy.linears if x.transposed}
        given = {n: (w.T if n in turned else w) for n, w in own.items()}
        assert share(given) < 1e-12
        found = share({n: w * 1.1 for n, w in given.items()})
        outputs = []
        for factor in (1.0, 1.1):
            model.skeleton.load({f"{prefix}.{n}.weight": w * factor for n, w in own.items()})
            calls = model.skeleton.calls(1, 16)
            outputs.append(torch.cat([model.skeleton.run(0, store.read(n, n + 1), calls) for n in (0, 1)]))
    change = (outputs[1] - outputs[0]).double().square().sum(-1) / outputs[0].double().square().sum(-1)
    assert found == pytest.approx(float(change.mean()), rel=1e-4)
    assert found > 1e-4
