"""Passes that stand at a site go on with rounded inputs, in step as one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lilliput import api
from lilliput.errors import LilliputError, PlanError
from lilliput.parts.inputs.grid import InputGrid
from lilliput.parts.inputs.uniform import UniformInput
from lilliput.progress import Quiet
from lilliput.runtime import inputs
from lilliput.streaming import lockstep

Tiny = Callable[[str], Path]


def test_a_suspended_pass_rounds_what_was_attached_while_it_stood() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 4)
    samples = [torch.randn(3, 8) for _ in range(2)]
    out: dict[int, Tensor] = {}
    seen: list[Tensor] = []
    grid = InputGrid(UniformInput(2))

    def one(n: int) -> Callable[[], None]:
        return lambda: out.__setitem__(n, second(first(samples[n])))

    def arrived(site: str) -> None:
        inputs.attach({"first": first, "second": second}[site], inputs.Rounding(grid))

    taps = [lockstep.Tap("first", first), lockstep.Tap("second", second)]
    with torch.no_grad():
        lockstep.walk(taps, [one(0), one(1)], lambda _, x: seen.append(x), arrived)
        for n, x in enumerate(samples):
            inputs.detach(first)
            inputs.detach(second)
            middle = first(grid.round(x))
            assert torch.equal(out[n], second(grid.round(middle)))
            assert torch.equal(seen[n], x)  # statistics are of inputs before they are rounded
            assert torch.equal(seen[2 + n], middle)


@pytest.mark.slow
def test_a_folder_that_rounds_inputs_is_not_compressed_again_nor_converted(tiny: Tiny, tmp_path: Path) -> None:
    steps = "steps:\n  - {method: rtn, target: {bits: 4, group_size: 16}}\n  - {method: act-static-dynamic}\n"
    for export in ("lilliput", "compressed-tensors"):
        folder = tmp_path / export
        api.compress(
            tiny("qwen2"),
            folder,
            recipe=f"export: {export}\n{steps}",
            samples=2,
            tokens=16,
            eval_windows=0,
            progress=Quiet(),
        )
        with pytest.raises(PlanError, match="rounds the inputs"):
            api.compress(folder, tmp_path / "again", recipe="rtn", progress=Quiet())
        for container in ("gptq", "awq", "mlx", "adapter"):
            with pytest.raises(LilliputError, match=r"rounds the inputs|inputs int8 token"):
                api.convert(folder, tmp_path / container, to=container)
    with pytest.raises(PlanError, match="fewer sinks"):
        api.compress(
            tiny("qwen2"),
            tmp_path / "cache",
            recipe="steps:\n  - {method: kvquant, target: {bits: 3}, options: {sinks: 16}}",
            samples=2,
            tokens=16,
            progress=Quiet(),
        )
