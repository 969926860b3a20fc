"""LoRA against its equations: the best product for what is lost, and models of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lilliput.errors import PlanError
from lilliput.model.stored import open_model

NAME = "model.layers.1.mlp.up_proj"


def test_loftq_begins_at_the_svd_of_what_is_lost(
    lab: Callable[..., Any], coded: Callable[..., Path], tiny: Callable[[str], Path]
) -> None:
    lost = (open_model(tiny("llama")).read(f"{NAME}.weight") - open_model(coded()).read(f"{NAME}.weight")).double()
    errors = []
    for rank in (2, 8):
        made = lab(
            "lora", original=tiny("llama"), target={"rank": rank}, start="loftq", alpha=3.0, teacher=tiny("llama")
        )
        down, up = made.student.adapter.factors()[NAME]
        product = (3.0 / rank * up.double() @ down.double()).detach()
        u, s, v = torch.linalg.svd(lost)
        torch.testing.assert_close(product, u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-4, atol=1e-5)
        errors.append(float((lost - product).norm()))
    assert errors[1] < errors[0] < float(lost.norm())


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_transposed_weights_and_biases(
    lab: Callable[..., Any], coded: Callable[..., Path], shared: Any, tmp_path: Path, name: str
) -> None:
    made = lab("lora", coded(name), target={"rank": 4}, alpha=32.0)
    made.steps(0, 1, 2, 3)
    apart, moved = shared.faithful(made, tmp_path)
    assert float(apart) < 1e-4
    assert float(moved) > 1e-3


def test_some_linears_alone(lab: Callable[..., Any]) -> None:
    made = lab("lora", target={"rank": 4}, where={"include": ["q", "v"]})
    assert {x.rsplit(".", 1)[-1] for x in made.student.adapter.factors()} == {"q_proj", "v_proj"}


def test_experts_have_one_where_the_folder_keeps_them_apart(
    lab: Callable[..., Any], coded: Callable[..., Path], shared: Any, tmp_path: Path
) -> None:
    made = lab("lora", coded("mixtral"), target={"rank": 4}, alpha=32.0)
    assert any(".experts." in x for x in made.student.adapter.factors())
    made.steps(0, 1, 2, 3)
    apart, moved = shared.faithful(made, tmp_path)
    assert float(apart) < 1e-4 < float(moved)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"target": {"rank": 65}}, "rank of 64 or less"),
        ({"where": {"include": ["nothing*"]}}, "applies to no layer"),
        ({"start": "loftq"}, "--teacher"),
        ({"others": ["*norm*"]}, "`others` would train some"),
    ],
)
def test_what_cannot_be_is_named(shared: Any, coded: Callable[..., Path], more: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        shared.planned(coded(), "lora", **more)


def test_order_experts_and_missing_peft(
    shared: Any, coded: Callable[..., Path], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lilliput import api

    given = {"samples": 2, "tokens": 16, "device": "cpu"}
    with pytest.raises(PlanError, match="put the adapter last"):
        api.plan(tiny("llama"), recipe="steps:\n- {method: lora}\n- {method: rtn, target: {bits: 4}}\n", **given)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"exclude: \['\*experts\*'"):
        api.plan(tiny("mixtral"), recipe="steps:\n- {method: lora, options: {tokens: 16}}\n", **given)  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(PlanError, match=r"pip install 'lilliput\[peft\]'"):
        shared.planned(coded(), "lora")


def test_a_plan_counts_the_packed_base(shared: Any, coded: Callable[..., Path], tiny: Callable[[str], Path]) -> None:
    from lilliput.plan import adapting
    from lilliput.streaming.peak import Run

    folder = coded("wide")
    plan, model = shared.planned(folder, "lora"), open_model(folder)
    blocks = model.anatomy().blocks
    run = Run(blocks, 256, 512, samples=2, tokens=16, itemsize=2, stored=4)
    (task,) = plan.resolved.tasks
    phase = adapting.phase(plan.resolved, task, run, model)
    packed = sum(x.scheme.size_bits(*adapting._shape(x)) for x in plan.resolved.linears) / 8
    dense = 2 * sum(x.linear.parameters for x in plan.resolved.linears)
    trained = 16 * adapting.numbers(plan.resolved, task, run)
    assert packed < phase.cost.ram - trained < dense


def test_the_base_is_held_as_the_folder_holds_it(lab: Callable[..., Any], coded: Callable[..., Path]) -> None:
    """In no more bytes than its file, while a step is carried out and after it."""
    made = lab("lora", coded("wide"), target={"rank": 2})
    made.steps(0)
    model = made.student.model
    tensors = {x.data_ptr(): x for x in (*model.parameters(), *model.buffers()) if not x.requires_grad}
    held = sum(x.numel() * x.element_size() for x in tensors.values())
    assert held <= 1.01 * (coded("wide") / "model.safetensors").stat().st_size
