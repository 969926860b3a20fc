"""Dynamic pruning against slow versions: the regression, the gates, what they leave out, and masks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import lilliput
from lilliput import api
from lilliput.algebra import contributions
from lilliput.errors import LilliputError, PlanError, SourceError
from lilliput.methods.behaviour.dynamic_pruning import Options, fit
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe
from lilliput.runtime import behaviours
from lilliput.runtime.behaviours.gates import BIAS, WEIGHT, gated
from lilliput.verbs.behave import Mlp, MlpIO

Tiny = Callable[[str], Path]
WIDTH, INPUTS, GROUPS = 20, 16, 4  # groups of 6, 6, 6 and 2


def slow_norms(down: Tensor, hidden: Tensor, size: int) -> Tensor:
    rows = []
    for h in hidden.double():
        found = []
        for start in range(0, down.shape[1], size):
            added = torch.zeros(len(down), dtype=torch.float64)
            for j in range(start, min(start + size, down.shape[1])):
                added = added + down[:, j].double() * h[j]
            found.append(float(added.norm()))
        rows.append(found)
    return torch.tensor(rows, dtype=torch.float64)


def test_contributions_are_norms_of_what_groups_add() -> None:
    draw = torch.Generator().manual_seed(0)
    down, hidden = torch.randn(9, WIDTH, generator=draw), torch.randn(7, WIDTH, generator=draw)
    found = contributions.norms(hidden, contributions.grams(down, 6))
    torch.testing.assert_close(found.double(), slow_norms(down, hidden, 6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("predicts", ["norm", "log"])
def test_the_predictor_is_the_ridge_regression(predicts: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    down = torch.randn(9, WIDTH, generator=draw)
    x, hidden = torch.randn(60, INPUTS, generator=draw) + 0.5, torch.randn(60, WIDTH, generator=draw)
    io = MlpIO(
        Mlp("mlp", ("up",), "down", INPUTS, WIDTH), down, lambda: zip(x.split(17), hidden.split(17), strict=True)
    )
    found = fit(io, Options(channels=6, predicts=predicts, ridge=0.05))
    y = slow_norms(down, hidden, 6)
    if predicts == "log":
        y = (y + 1e-3 * y.mean()).log()
    centred, wanted = x.double() - x.double().mean(0), y - y.mean(0)
    damping = 0.05 * float((centred.T @ centred).diagonal().mean())
    # The ridge as further rows of an ordinary regression.
    rows = torch.cat([centred, math.sqrt(damping) * torch.eye(INPUTS, dtype=torch.float64)])
    best = torch.linalg.lstsq(rows, torch.cat([wanted, torch.zeros(INPUTS, GROUPS, dtype=torch.float64)])).solution.T
    torch.testing.assert_close(found[WEIGHT].double(), best, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[BIAS].double(), y.mean(0) - best @ x.double().mean(0), rtol=1e-3, atol=1e-3)


def model() -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=61, hidden_size=INPUTS, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=WIDTH, max_position_embeddings=64,
    )  # fmt: skip
    made = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for value in made.parameters():
            if value.dim() > 1:
                value.mul_(6.0)
    return made


def with_gates(keep: float) -> Any:
    made = model()
    mlps = {f"model.layers.{n}.mlp": {"rows": ["gate_proj", "up_proj"], "columns": "down_proj"} for n in range(2)}
    entry = {
        "kind": "dynamic-pruning", "blocks": ["model.layers.0", "model.layers.1"], "keep": keep, "group_size": 6,
        "mlps": mlps,
    }  # fmt: skip
    draw = torch.Generator().manual_seed(5)
    drawn = {
        f"{name}.{key}": torch.randn(GROUPS, *([INPUTS] if key == WEIGHT else []), generator=draw)
        for name in mlps
        for key in (WEIGHT, BIAS)
    }
    behaviours.install(made, [entry], drawn.__getitem__)
    return made


def slow_mlp(mlp: Any, x: Tensor, used: int) -> tuple[Tensor, int]:
    """Outputs of an MLP, token by token and channel by channel, and the channels that were used."""
    gates, out, count = mlp.gates, torch.zeros_like(x), 0
    for t in range(len(x)):
        predicted = [float(gates.weight[g] @ x[t] + gates.bias[g]) for g in range(GROUPS)]
        for g in sorted(range(GROUPS), key=lambda g: -predicted[g])[:used]:
            for j in range(6 * g, min(6 * g + 6, WIDTH)):
                gate = mlp.gate_proj.weight[j] @ x[t]
                out[t] += mlp.down_proj.weight[:, j] * (gate * torch.sigmoid(gate)) * (mlp.up_proj.weight[j] @ x[t])
                count += 1
    return out, count


@torch.no_grad()
def test_tokens_use_the_groups_with_the_largest_predictions_and_the_count_is_theirs() -> None:
    made = with_gates(0.5)
    mlp, state = gated(made)[0], behaviours.require(made)
    x = torch.randn(9, INPUTS, generator=torch.Generator().manual_seed(2))
    together = mlp(x[None])[0]
    wanted, count = slow_mlp(mlp, x, 2)
    torch.testing.assert_close(together, wanted, rtol=1e-4, atol=1e-4)
    state.work.share()
    assert state.work.executed == (count - 9 * WIDTH) * 3 * INPUTS + 9 * GROUPS * INPUTS
    for t in range(9):
        torch.testing.assert_close(mlp(x[None, t : t + 1])[0, 0], wanted[t], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_token_by_itself_reads_only_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_gates(0.5)
    mlp, widths = gated(made)[0], []
    mlp.act_fn.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    mlp(torch.randn(1, 3, INPUTS))
    mlp(torch.randn(1, 1, INPUTS))
    assert widths[0] == WIDTH
    assert widths[1] in (8, 12)


@torch.no_grad()
def test_keeping_all_is_the_model_itself() -> None:
    ids, made = torch.arange(10)[None], with_gates(1.0)
    assert torch.equal(made(ids).logits, model()(ids).logits)
    assert behaviours.require(made).work.share() == 1.0


@torch.no_grad()
def test_generating_without_a_cache_finds_the_same() -> None:
    made, ids = with_gates(0.5), torch.arange(10)[None]
    one, other = (
        made.generate(ids, max_new_tokens=6, do_sample=False, use_cache=x, pad_token_id=0) for x in (True, False)
    )
    assert torch.equal(one, other)


def compress(source: Path, out: Path, steps: list[Any], windows: int = 0, progress: Any = None) -> Any:
    recipe = Recipe.model_validate({"name": "gates", "steps": steps})
    return api.compress(
        source, out, recipe=recipe, samples=4, tokens=32, device="cpu", dtype="float32", eval_windows=windows,
        progress=Quiet() if progress is None else progress,
    )  # fmt: skip


GATES = {"method": "dynamic-pruning", "options": {"channels": 8, "keep": 0.5}}


def test_a_written_folder_has_gates_wherever_it_is_loaded(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compress(tiny("llama"), out, [{"method": "rtn", "target": {"bits": 8}}, GATES], windows=2)
    assert result.engine.logits == pytest.approx(0.0, abs=1e-4)
    work = json.loads((out / "lilliput.json").read_text())["measured"]["work"]
    dense, predictors = 64 * (64 * 2 + 32 * 2) + 3 * 64 * 128, 16 * 64
    assert work["dense"] == 4 * dense * 512
    assert work["executed"] == 4 * (dense - 3 * 64 * 64 + predictors) * 512
    assert work["predicted"] == pytest.approx(work["share"], rel=1e-12)
    loaded: Any = lilliput.load(out)
    ids = torch.arange(12)[None]
    loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert behaviours.require(loaded).work.share() == pytest.approx(work["share"])
    with behaviours.paused(loaded), torch.no_grad():
        whole = loaded(ids).logits
    with torch.no_grad():
        assert not torch.equal(loaded(ids).logits, whole)
    assert api.verify(out).whole


def test_later_blocks_are_fitted_to_what_gates_leave(tiny: Tiny, tmp_path: Path) -> None:
    few, all_of_them = tmp_path / "few", tmp_path / "all"
    compress(tiny("llama"), few, [GATES])
    compress(tiny("llama"), all_of_them, [{**GATES, "options": {"channels": 8, "keep": 1.0}}])
    one, other = (load_file(x / "model.safetensors") for x in (few, all_of_them))
    assert torch.equal(one[f"model.layers.0.mlp.{WEIGHT}"], other[f"model.layers.0.mlp.{WEIGHT}"])
    assert not torch.equal(one[f"model.layers.1.mlp.{WEIGHT}"], other[f"model.layers.1.mlp.{WEIGHT}"])


class Stopped(Quiet):
    """Ends a run after two blocks."""

    def step(self, done: int, total: int, *args: Any, **options: Any) -> None:
        if done == 2:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_with_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    compress(tiny("llama"), tmp_path / "whole", [GATES])
    with pytest.raises(KeyboardInterrupt):
        compress(tiny("llama"), tmp_path / "killed", [GATES], progress=Stopped())
    result = compress(tiny("llama"), tmp_path / "killed", [GATES])
    assert result.skipped == 2
    one, other = (tmp_path / x / "model.safetensors" for x in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_masks_switch_without_a_change_of_weights(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(tiny("llama"), out, [GATES])
    text = tmp_path / "words.txt"
    text.write_text("one two three four five six seven eight nine ten " * 200)
    lilliput.record_mask(out, "words", str(text), windows=2, tokens=32)
    lilliput.record_mask(out, "docs", "docs:library", windows=2, tokens=32)
    lilliput.record_mask(out, "all", str(text), windows=2, tokens=32, keep=1.0)
    loaded: Any = lilliput.load(out)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    files = {path: path.read_bytes() for path in out.glob("*.safetensors")}
    ids, seen = torch.arange(12)[None], {}
    with torch.no_grad():
        for name in (None, "words", "docs", "all", None):
            lilliput.use_mask(loaded, name)
            seen.setdefault(name, []).append(loaded(ids).logits)
        with behaviours.paused(loaded):
            whole = loaded(ids).logits
    assert torch.equal(*seen[None])
    assert not torch.equal(seen["words"][0], seen["docs"][0])
    torch.testing.assert_close(seen["all"][0], whole)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    assert files == {path: path.read_bytes() for path in out.glob("*.safetensors")}
    groups = json.loads((out / "masks" / "words.json").read_text())["groups"]
    assert {len(x) for x in groups.values()} == {8}
    with pytest.raises(SourceError, match=r"no mask 'code' .it has: all, docs, words"):
        lilliput.use_mask(loaded, "code")
    with pytest.raises(LilliputError, match="no name for a mask"):
        lilliput.use_mask(loaded, "../words")
    with pytest.raises(LilliputError, match="has no behaviours"):
        lilliput.use_mask(model(), "words")


def test_what_has_no_single_mlp_is_refused(tiny: Tiny) -> None:
    for name, said in (("mixtral", "no single MLP"), ("gpt2", "plain linears of one module")):
        recipe = Recipe.model_validate({"name": "gates", "steps": [GATES]})
        with pytest.raises(PlanError, match=said):
            api.plan(tiny(name), recipe=recipe, samples=1, tokens=16)
    wide = Recipe.model_validate({"name": "x", "steps": [{"method": "dynamic-pruning", "options": {"channels": 999}}]})
    with pytest.raises(PlanError, match="give fewer `channels`"):
        api.plan(tiny("llama"), recipe=wide, samples=1, tokens=16)
