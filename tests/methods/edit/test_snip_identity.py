"""Residual branches that become the identity: what is measured, what the written model computes, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilliput import api
from lilliput.errors import LilliputError, PlanError
from lilliput.methods.edit import snip_identity
from lilliput.methods.edit.snip_identity import Options
from lilliput.model.edited import Edit, heads_of
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.run.journal import Work
from lilliput.streaming import branches
from lilliput.streaming.forward import through
from lilliput.streaming.walk import Flow, walk
from lilliput.verbs.edits import Sizes, Units

Tiny = Callable[[str], Path]
RUN: dict[str, Any] = {
    "samples": 3, "tokens": 32, "device": "cpu", "dtype": "float32", "eval_windows": 0, "progress": Quiet()
}  # fmt: skip


def quiet_model(tiny: Tiny, folder: Path, kind: str, factor: float = 1e-3) -> Any:
    """The MLP of block 1 and the attention of block 0 write next to nothing."""
    model = AutoModelForCausalLM.from_pretrained(tiny(kind))
    layers = model.transformer.h if kind == "gpt2" else model.model.layers
    with torch.no_grad():
        if kind == "gpt2":
            pairs = [layers[0].attn.c_proj, layers[1].mlp.c_proj]
        elif kind == "mixtral":
            pairs = [layers[0].self_attn.o_proj]
            layers[1].mlp.experts.down_proj.mul_(factor)
        else:
            pairs = [layers[0].self_attn.o_proj, layers[1].mlp.down_proj]
        for linear in pairs:
            linear.weight.mul_(factor)
            if getattr(linear, "bias", None) is not None:
                linear.bias.mul_(factor)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny(kind)).save_pretrained(folder)
    return model.eval()


def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    note = Work.note

    def noting(self: Work, record: dict[str, Any]) -> None:
        records.append(record)
        note(self, record)

    monkeypatch.setattr(Work, "note", noting)
    return records


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_written_model_skips_exactly_the_branches_below_the_threshold(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = quiet_model(tiny, tmp_path / "model", kind)
    records = told(monkeypatch)
    recipe = "steps:\n  - {method: snip-identity, options: {threshold: 0.02}}\n"
    done = api.compress(tmp_path / "model", tmp_path / "out", recipe=recipe, **RUN)
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors"))
    (edit,) = [Edit.from_plain(x["edit"]) for x in records if x["kind"] == "edit"]
    assert set(edit.silent) == {(0, "attention"), (1, "mlp")}
    ids = torch.arange(24)[None]
    with torch.no_grad():
        layers = model.transformer.h if kind == "gpt2" else model.model.layers
        attention = layers[0].attn if kind == "gpt2" else layers[0].self_attn
        attention.register_forward_hook(lambda _, args, out: (torch.zeros_like(out[0]), *out[1:]))
        layers[1].mlp.register_forward_hook(
            lambda _, args, out: (
                (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
            )
        )
        expected = model(ids).logits
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(written(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_the_measure_is_the_mean_ratio_of_norms_by_token(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Against what hooks see in transformers' model; in neox both branches read the block's inputs."""
    whole = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    layers = whole.gpt_neox.layers if kind == "neox" else whole.model.layers
    seen: dict[str, list[Tensor]] = {"x": [], "attention": [], "mlp": []}

    def taken(key: str) -> Any:
        return lambda _, args, out: seen[key].append(out[0] if isinstance(out, tuple) else out)

    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen["x"].append(args[0]))
        (layer.attention if kind == "neox" else layer.self_attn).register_forward_hook(taken("attention"))
        layer.mlp.register_forward_hook(taken("mlp"))
    ids = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    model = open_model(tiny(kind))
    with torch.no_grad():
        whole(ids)
        for passage in walk(model, Flow(ids, 2, tmp_path, "states", torch.float32)):
            n, skeleton = passage.block, model.skeleton
            assert passage.batches is not None
            assert passage.inputs is not None
            assert passage.outputs is not None
            for run in through(skeleton, n, passage.batches, passage.inputs, passage.outputs):
                run()
            block = model.anatomy().blocks[n]
            got = branches.added(skeleton, n, block, passage.batches, passage.inputs, passage.outputs)
            x, a, m = (seen[key][n].double() for key in ("x", "attention", "mlp"))
            assert got["attention"] == pytest.approx(float((a.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4)
            assert got["mlp"] == pytest.approx(float((m.norm(dim=-1) / (x + a).norm(dim=-1)).mean()), rel=1e-4)


def test_shrunk_it_computes_the_same_in_fewer_bytes(tiny: Tiny, tmp_path: Path) -> None:
    quiet_model(tiny, tmp_path / "model", "llama")
    for shrink in ("false", "true"):
        steps = f"  - {{method: snip-identity, options: {{threshold: 0.02, shrink: {shrink}}}}}\n"
        api.compress(tmp_path / "model", tmp_path / shrink, recipe="steps:\n" + steps, **RUN)
    model = open_model(tmp_path / "true")
    first, second = model.anatomy().blocks[:2]
    assert (len(heads_of(first)), first.groups.channels[0].width) == (1, 128)
    assert (len(heads_of(second)), second.groups.channels[0].width) == (2, 8)
    plain, small = (AutoModelForCausalLM.from_pretrained(tmp_path / x).eval() for x in ("false", "true"))
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    sizes = [sum(x.stat().st_size for x in (tmp_path / y).glob("*.safetensors")) for y in ("true", "false")]
    assert sizes[0] < sizes[1]


def test_only_the_branches_that_are_asked_for_go_and_nan_is_refused() -> None:
    scores = [{"attention": (0.01,), "mlp": (0.3,)}, {"attention": (0.3,), "mlp": (0.01,)}]
    units, sizes = [Units((64,), 4, 3, 5, 100)] * 2, Sizes(2)
    assert snip_identity.run(scores, units, sizes, Options()).silent == ((0, "attention"), (1, "mlp"))
    assert snip_identity.run(scores, units, sizes, Options(kinds=("mlp",))).silent == ((1, "mlp"),)
    assert snip_identity.run(scores, units, sizes, Options(threshold=0.0)).silent == ()
    with pytest.raises(LilliputError, match="NaN"):
        snip_identity.run([{"mlp": (float("nan"),)}] * 2, units, sizes, Options())
    with pytest.raises(PlanError, match="leave shrink at false"):
        snip_identity.sizes([Units((64, 64), 4, 3, 5, 100)], Options(shrink=True))
