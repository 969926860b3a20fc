"""What every adapter owes: the folder as it is at first, gradients of its own, peft's logits, the same resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lilliput
from lilliput.model.stored import open_adapted

PEFT = ("lora", "dylora", "adalora", "bitfit", "prefix-tuning", "prompt-tuning", "qa-lora")
METHODS = (*PEFT, "adapter")
FRESH = ("lora", "dylora", "adalora", "bitfit", "qa-lora", "adapter")  # those that add nothing at first
RANKED = {"lora": 8, "dylora": 4, "adalora": 2, "qa-lora": 2}


def asked(method: str) -> dict[str, Any]:
    """A small one."""
    found: dict[str, Any] = {"target": {"rank": RANKED[method]}} if method in RANKED else {}
    return found | ({"length": 3} if method in ("prefix-tuning", "prompt-tuning") else {})


@pytest.fixture
def make(lab: Callable[..., Any], coded: Callable[..., Path], shared: Any) -> Callable[..., Any]:
    def made(method: str, **more: Any) -> Any:
        folder = coded("llama", shared.AFFINE) if method == "qa-lora" else coded()
        return lab(method, folder, **asked(method), **more)

    return made


@pytest.mark.parametrize("method", FRESH)
def test_nothing_changes_before_the_first_step(make: Callable[..., Any], shared: Any, method: str) -> None:
    made = make(method)
    with torch.no_grad():
        torch.testing.assert_close(made.logits(), shared.opened(made.folder)(shared.ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_is_trained_and_the_base_stays(make: Callable[..., Any], method: str) -> None:
    made = make(method)
    before = {n: x.clone() for n, x in made.student.model.state_dict(keep_vars=True).items() if not x.requires_grad}
    packed = {n: x.clone() for n, x in made.student.model.named_buffers() if ".packed_" in n}
    assert packed
    leaves = {n: x.detach().clone() for n, x in made.leaves().items()}
    first, *_, last = made.steps(0, 1, 2, 3)
    assert last < first
    assert any(not torch.equal(x, leaves[n]) for n, x in made.leaves().items())
    assert all(any(k in n for k in ("lora_", "beft_", "prompt_encoder", "networks")) for n in made.leaves())
    after = made.student.model.state_dict(keep_vars=True)
    assert all(torch.equal(x, after[n]) for n, x in before.items() if "ranknum" not in n)
    assert all(torch.equal(x, dict(made.student.model.named_buffers())[n]) for n, x in packed.items())


@pytest.mark.parametrize("method", PEFT)
def test_stock_peft_computes_what_was_trained(
    make: Callable[..., Any], shared: Any, tmp_path: Path, method: str
) -> None:
    made = make(method)
    made.steps(0, 1, 2, 3)
    apart, moved = shared.faithful(made, tmp_path)
    assert float(apart) < 1e-4
    assert float(moved) > 1e-3


@pytest.mark.parametrize("method", [x for x in METHODS if x not in ("prefix-tuning", "prompt-tuning")])
def test_linears_compute_with_it_without_peft(
    make: Callable[..., Any], shared: Any, tmp_path: Path, method: str
) -> None:
    """A loaded model, and the skeleton that evaluations stream, rounded inputs or not."""
    made = make(method)
    made.steps(0, 1, 2, 3)
    place = made.save(tmp_path / "adapter")
    model, streamed = shared.opened(made.folder), open_adapted(made.folder, place)
    lilliput.use_adapter(model, place)
    streamed.load(streamed.skeleton.shapes)
    with torch.no_grad():
        own = made.logits()
        torch.testing.assert_close(model(shared.ids()).logits, own, rtol=0, atol=1e-4)
        skeleton = streamed.skeleton
        read = skeleton.logits(skeleton.read(shared.ids(), None, None))
        torch.testing.assert_close(read, own, rtol=0, atol=1e-4)
        assert float((shared.opened(made.folder)(shared.ids()).logits - own).abs().max()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_has_the_same_losses(
    make: Callable[..., Any],
    losses: Callable[[Any], tuple[float, ...]],
    shared: Any,
    tmp_path: Path,
    method: str,
) -> None:
    straight = make(method, save=2)
    expected = losses(straight)
    place = shared.Memory(tmp_path)
    killed = make(method, save=2, place=place)
    real = killed.trainer.step

    def step(samples: Any, now: Any) -> float:
        if now.step == 3:
            raise KeyboardInterrupt
        return float(real(samples, now))

    killed.trainer.step = step
    with pytest.raises(KeyboardInterrupt):
        losses(killed)
    resumed = make(method, save=2, place=place)
    assert losses(resumed) == expected
    for folder, x in (("a", straight), ("b", resumed)):
        x.save(tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
