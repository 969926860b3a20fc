"""A budget of bytes for the folder and the keys and values of one sequence: what is counted, chosen, kept to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from lilliput import api
from lilliput.anatomy.cached import argument
from lilliput.cli.main import app
from lilliput.errors import PlanError
from lilliput.plan.contexts import Context
from lilliput.plan.plan import Plan
from lilliput.runtime import caches
from lilliput.runtime.caches.kivi import KiviSpec

Tiny = Callable[[str], Path]
TOKENS, BUDGET = 200, 260_000
ASKED: dict[str, Any] = {
    "context": TOKENS, "menu": ("int2/32/asym", "int4/32/asym", "int8/32/asym"), "samples": 4, "tokens": 96,
    "device": "cpu", "settings": ("menu.residual=32", "menu.trial_samples=1"),
}  # fmt: skip


def counted(plan: Plan) -> Context:
    assert plan.context is not None
    return plan.context


def held(folder: Path, tokens: int) -> int:
    """Bytes that the cache of the written model holds of one sequence, in the dtype that it is loaded in."""
    model: Any = api.load(folder, dtype="auto")
    with torch.no_grad():
        cache = model(torch.arange(tokens)[None], use_cache=True)[argument(model.forward)]
    taken = 0
    for layer in cache.layers:
        if hasattr(layer, "codec"):
            layer.crop(0)
            taken += layer.codec.held_bits() // 8
        else:
            taken += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
    return taken


def whole(folder: Path) -> int:
    return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())


@pytest.fixture(scope="module")
def written(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> api.Compression:
    out = tmp_path_factory.mktemp("written") / "out"
    return api.compress(tiny("llama"), out, size=BUDGET, eval_windows=2, **ASKED)


def test_folder_and_cache_are_within_the_size_as_written_and_as_generated(written: api.Compression) -> None:
    context = counted(written.plan)
    assert context.bytes == held(written.out, TOKENS) < context.plain_bytes
    assert BUDGET - 10_000 < whole(written.out) + context.bytes <= written.plan.whole_bytes <= BUDGET
    kinds = {x["kind"] for x in json.loads((written.out / "config.json").read_text())["quantization_config"]["caches"]}
    assert kinds == {"kivi"}


def test_what_was_chosen_is_in_recipe_report_and_answer(written: api.Compression) -> None:
    context = counted(written.plan)
    steps = [x for x in written.plan.resolved.recipe.steps if x.method == "kivi"]
    layers = [n for x in steps for n in x.options["layers"]]
    assert len(layers) == len(set(layers))
    told = json.loads((written.out / "lilliput.json").read_text())
    assert told["measured"] | context.to_json() == told["measured"]
    assert [x["method"] for x in told["recipe"]["steps"]][-len(steps) :] == ["kivi"] * len(steps)
    assert "| keys and values of 200 tokens |" in (written.out / "README.md").read_text()
    assert f"Keys and values of {TOKENS} tokens take" in written.plan.notes[-1]
    answer = written.to_json()
    for part in ("predicted", "measured"):
        assert answer[part]["cache_bytes"] == context.bytes
    assert written.evaluation is not None
    assert written.evaluation.cache is not None


def test_the_recipe_of_such_a_folder_keeps_its_caches(written: api.Compression, tiny: Tiny) -> None:
    recipe = written.plan.resolved.recipe
    plan = api.plan(tiny("llama"), recipe=recipe, samples=4, tokens=96, device="cpu")
    assert (counted(plan).choosing, counted(plan).bytes) == ((), counted(written.plan).bytes)
    with pytest.raises(PlanError, match="--context 100 and the recipe's `context` of 200 tokens contradict"):
        api.plan(tiny("llama"), recipe=recipe, context=100, samples=4, tokens=96, device="cpu")


def test_before_anything_is_measured_the_plan_has_the_least(tiny: Tiny) -> None:
    plan = api.plan(tiny("llama"), size=BUDGET, **ASKED)
    context = counted(plan)
    assert context.bytes == sum(min(x.sizes.values()) for x in context.choosing)
    assert plan.to_json()["cache_bytes"] == context.bytes
    assert any("measuring decides how 4 of 4 blocks store them" in x for x in plan.notes)
    bits = {j: context.choosing[0].specs[j].size_bits(TOKENS, context.choosing[0].shape, 32) for j in range(1, 5)}
    assert {8 * n for j, n in context.choosing[0].sizes.items() if j} == set(bits.values())


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Callable[[str], Path]:
    """Gemma 2, whose every second layer sees a window of 16 tokens, or Mistral, all of whose layers do."""
    root = tmp_path_factory.mktemp("windowed")
    shared: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_hidden_layers": 4, "intermediate_size": 64, "sliding_window": 16, "max_position_embeddings": 256,
    }  # fmt: skip

    def make_one(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            config = tf.Gemma2Config(**shared) if name == "gemma" else tf.MistralConfig(**shared)
            tf.AutoModelForCausalLM.from_config(config).float().save_pretrained(root / name)
            tf.AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(root / name)
        return root / name

    return make_one


@pytest.mark.parametrize(("name", "able"), [("gemma", 2), ("mistral", 0)])
def test_windows_keep_plain_caches_and_count(
    windowed: Callable[[str], Path], name: str, able: int, tmp_path: Path
) -> None:
    plan = api.plan(windowed(name), size=400_000, **ASKED)
    context = counted(plan)
    window, growing = 15 * 2 * 32 * 4, TOKENS * 2 * 32 * 4
    assert sorted(context.plain) == sorted([window] * (4 - able) + [growing] * able)
    assert len(context.choosing) == able
    assert any(f"{4 - able} of 4 blocks keep keys and values as they are" in x for x in plan.notes)
    made = api.compress(windowed(name), tmp_path / "out", size=400_000, eval_windows=0, **ASKED)
    assert counted(made.plan).bytes == held(made.out, TOKENS)
    assert whole(made.out) + counted(made.plan).bytes <= 400_000


def test_the_frontier_of_a_model_says_what_it_counts(tiny: Tiny, tmp_path: Path) -> None:
    args = ["plan", str(tiny("llama")), "--frontier", "--context", "200", "--menu", ",".join(ASKED["menu"])]
    args += ["--samples", "4", "--tokens", "96", "--set", "menu.residual=32", "--html", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["context"] == 200
    assert {"plain", "kivi2"} <= {name for x in told["frontier"] for name in x["caches"]}
    page = (tmp_path / "page.html").read_text()
    assert "keys and values of 200 tokens included" in page
    assert "x kivi2" in page


def test_the_command_line_counts_the_cache(tiny: Tiny, tmp_path: Path) -> None:
    args = [str(tiny("llama")), "--context", "200", "--menu", ",".join(ASKED["menu"]), "--samples", "4"]
    args += ["--tokens", "96", "--set", "menu.residual=32", "--size"]
    result = CliRunner().invoke(
        app, ["compress", *args, "260kB", "--out", str(tmp_path / "out"), "--eval-windows", "0"]
    )
    assert result.exit_code == 0, result.output
    assert "Keys and values of 200 tokens take" in " ".join(result.output.split())
    assert whole(tmp_path / "out") + held(tmp_path / "out", 200) <= 260_000
    shown = CliRunner().invoke(app, ["plan", *args, "100kB"])
    assert shown.exit_code == 2
    assert "keys and values of 200 tokens, at the fewest bits" in " ".join(shown.output.split())


def test_a_recipe_is_checked_with_its_cache(tiny: Tiny) -> None:
    asked: dict[str, Any] = {"recipe": "kv4", "context": 250, "tokens": 64, "samples": 4, "device": "cpu"}
    plan = api.plan(tiny("llama"), **asked)
    context = counted(plan)
    spec = KiviSpec(4, 4, 16, 128, False, 4)
    shape = caches.codec.CacheShape(2, 16, 16)
    assert 8 * context.bytes == 4 * spec.size_bits(250, shape, 32)
    assert plan.whole_bytes == plan.folder_bytes + context.bytes
    assert any(x.startswith("Keys and values of 250 tokens take ") and " in place of " in x for x in plan.notes)
    api.plan(tiny("llama"), size=plan.whole_bytes, **asked)
    with pytest.raises(PlanError, match=rf"bytes and {context.bytes} of keys and values for 250 tokens, 1 bytes"):
        api.plan(tiny("llama"), size=plan.whole_bytes - 1, **asked)
    plain = api.plan(tiny("llama"), **asked | {"recipe": "w4"})
    assert counted(plain).bytes == counted(plain).plain_bytes == 4 * 250 * 2 * 32 * 4
    assert "Keys and values of 250 tokens take 256.0 kB." in plain.notes


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"bits": 3.5}, "--bits is none: give --size in its place"),
        ({"decode_time": api.Decoding(1.0, "h100")}, "--decode-time is none: give --size"),
        ({"size": BUDGET, "to": "gguf", "menu": ()}, "which a gguf file does not say: leave --to out"),
        ({"size": BUDGET, "menu": ("compressed-tensors",)}, "only the native layout says: take --menu native"),
        ({"size": BUDGET, "context": 257}, "--context 257 is more than the model's 256 positions"),
        ({"size": BUDGET, "context": 0}, "--context 0 is no number of tokens"),
        ({"size": BUDGET, "tokens": 64}, "from token 64 on: give --tokens 128"),
        ({"size": 9_000_000}, "more than the model itself takes with keys and values of 200 tokens"),
        ({"size": BUDGET, "settings": ("menu.residual=24",)}, "24 tokens is no multiple.*leave --context out"),
        ({"size": BUDGET, "settings": ("menu.caches=[9]",)}, "caches"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tiny: Tiny, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        api.plan(tiny("llama"), **ASKED | asked)
