"""Where the work runs: on this processor, or on an accelerator."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lilliput import api
from lilliput.errors import PlanError
from lilliput.machine import device
from lilliput.progress import Quiet


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two accelerators, as torch tells of them; the list takes those that were chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_one_process_takes_what_it_is_given(accelerators: list[int]) -> None:
    assert [device.choose(x) for x in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(PlanError, match="there are 2 accelerators"):
        device.choose("cuda:2")
    assert accelerators == []


def test_each_of_several_takes_its_own(accelerators: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": "5", "RANK": "4", "LOCAL_RANK": "1"}
    for key, value in known.items():
        monkeypatch.setenv(key, value)
    assert [device.choose(x) for x in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert accelerators == [1, 1]
    with pytest.raises(PlanError, match="its own accelerator"):
        device.choose("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(PlanError, match="start at most that many processes"):
        device.choose("auto")


def test_what_there_is_not() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(PlanError, match="finds no such accelerator"):
            device.choose("cuda")
    with pytest.raises(PlanError, match="choose auto, cpu or cuda"):
        device.choose("abacus")


STEPS = {
    "awq, integers of three bits": "{method: awq}, {method: gptq, target: {bits: 3, group_size: 16}}",
    "spqr": "{method: spqr, target: {bits: 3, group_size: 16, symmetric: false, scale_dtype: int3/16}}",
    "trellis": "{method: quip, target: {format: trellis, bits: 2, group_size: channel}}",
    "codebook": "{method: codebook, target: {format: codebook, bits: 3, group_size: channel}}",
    "squeezellm": "{method: squeezellm, target: {format: codebook, bits: 3, group_size: channel}}",
    "real zero points": "{method: hqq, target: {format: affine, bits: 3, group_size: 16}}",
    "ranks": "{method: ranks}, {method: svd-truncate, target: {ratio: 0.8}, options: {weighting: gram}}",
    "smoothquant, signround": "{method: smoothquant}, {method: signround, target: {bits: 4, group_size: 16}, "
    "options: {iters: 2}}",
    "wanda": "{method: wanda, target: {sparsity: 0.5}}",
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", STEPS)
def test_steps_run_on_an_accelerator_as_they_do_here(tiny: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    recipe = f"steps: [{STEPS[name]}]\n"
    errors = []
    for where in ("cpu", "cuda"):
        done = api.compress(
            tiny("llama"), tmp_path / where, recipe=recipe, device=where, dtype="float32", samples=2, tokens=32,
            eval_windows=0, progress=Quiet(),
        )  # fmt: skip
        errors.append([row["error"] for row in done.rows])
    assert errors[1] == pytest.approx(errors[0], rel=0.1, abs=1e-3)
