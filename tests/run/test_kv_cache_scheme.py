"""The cache of 8-bit floats in compressed-tensors' layout: as the library describes it, and read as it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from lilliput import api
from lilliput.data import load_tokens
from lilliput.errors import PlanError, SourceError
from lilliput.export import cache_scheme
from lilliput.export.engine import _plain_caches
from lilliput.metrics.evaluate import evaluate
from lilliput.model.stored import open_model
from lilliput.runtime import caches

Tiny = Callable[[str], Path]
FP8 = {"method": "kv-fp8"}
WHOLE = {"method": "rtn", "target": {"bits": 8, "group_size": "channel", "symmetric": True}}
TOKENS, WINDOWS = 96, 2


def recipe(*steps: dict[str, Any], export: str = "auto") -> str:
    return f"export: {export}\nsteps:\n" + "".join(f"- {json.dumps(x)}\n" for x in steps)


def entry(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def written(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def write(*steps: dict[str, Any], export: str = "auto") -> Path:
        text = recipe(*steps, export=export)
        if text not in made:
            made[text] = tmp_path_factory.mktemp("written") / "out"
            api.compress(tiny("llama"), made[text], recipe=text, samples=4, tokens=64, eval_windows=0, device="cpu")
        return made[text]

    return write


@pytest.mark.parametrize("steps", [(FP8,), (WHOLE, FP8)], ids=["alone", "beside weights"])
def test_the_folder_is_what_the_library_describes(written: Callable[..., Path], steps: Any) -> None:
    folder = written(*steps)
    config = QuantizationConfig.model_validate(entry(folder))
    args = config.kv_cache_scheme
    assert args is not None
    assert (args.num_bits, args.type, args.strategy, args.symmetric, args.dynamic) == (
        8,
        "float",
        "tensor",
        True,
        False,
    )
    assert bool(config.config_groups) == (len(steps) > 1)
    tensors = load_file(folder / "model.safetensors")
    scales = {f"model.layers.{n}.self_attn.{side}_scale" for n in range(4) for side in "kv"}
    assert {name for name in tensors if name.endswith(("k_scale", "v_scale"))} == scales
    assert all(tensors[name].shape == (1,) and float(tensors[name]) > 0 for name in scales)


@pytest.mark.parametrize("steps", [(FP8,), (WHOLE, FP8)], ids=["alone", "beside weights"])
def test_it_is_scored_as_the_native_layout_is(written: Callable[..., Path], tiny: Tiny, steps: Any) -> None:
    ours, native = (evaluate(written(*steps, export=x), tiny("llama"), windows=WINDOWS, tokens=TOKENS, chunk=32)
                    for x in ("compressed-tensors", "lilliput"))  # fmt: skip
    assert ours.cache is not None
    assert ours.cache == native.cache
    assert ours.cache.bytes * 4 == ours.cache.plain_bytes  # float32 otherwise
    assert ours.perplexity.value == pytest.approx(native.perplexity.value, rel=1e-9)
    plain = open_model(written(*steps))
    with caches.paused(plain.skeleton.model):
        assert evaluate(plain, windows=WINDOWS, tokens=TOKENS).perplexity.value != ours.perplexity.value


def test_scales_are_the_largest_values_of_the_text(written: Callable[..., Path], tiny: Tiny) -> None:
    """Keys after their rotation, as the attention hands them to its cache."""
    model: Any = tf.AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    source = open_model(written(FP8)).source
    ids = load_tokens("docs:library", source.tokenizer(), samples=4, tokens=64).ids
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    # The calibration text is drawn elsewhere: what is large there is about as large here.
    for n, layer in enumerate(cache.layers):
        for side, x in (("k", layer.keys), ("v", layer.values)):
            found = float(source.read(f"model.layers.{n}.self_attn.{side}_scale"))
            assert found * 448 == pytest.approx(float(x.abs().max()), rel=0.3)


def test_the_engine_looks_at_the_weights_alone(written: Callable[..., Path]) -> None:
    assert not [x for row in api.verify(written(FP8)).rows for x in row.problems]

    class Attention(torch.nn.Module):
        kv_cache, quantization_scheme = object(), object()

    module = torch.nn.ModuleList([Attention()])
    _plain_caches(module)
    assert module[0].quantization_scheme is None


def test_what_engines_cannot_say_is_native(tiny: Tiny) -> None:
    def planned(*steps: dict[str, Any], export: str = "auto", model: str = "llama") -> Any:
        return api.plan(tiny(model), recipe=recipe(*steps, export=export), device="cpu", tokens=64, samples=4)

    assert planned(FP8).exporter == "compressed-tensors"
    assert planned(FP8, export="lilliput").exporter == "lilliput"
    some = FP8 | {"options": {"layers": [0, 1]}}
    others = {"method": "kv-rtn", "options": {"layers": [0]}}
    assert planned({"method": "rtn", "target": {"bits": 3, "format": "nf"}}, FP8).exporter == "lilliput"
    assert planned(FP8, model="gpt2").exporter == "lilliput"
    for steps, words in (
        ((some,), r"its cache is that of all blocks, and model\.layers\.2 keeps a plain one"),
        ((FP8, others), "it knows no cache but that of kv-fp8, and the recipe has kv-rtn"),
    ):
        assert planned(*steps).exporter == "lilliput"
        with pytest.raises(PlanError, match=words):
            planned(*steps, export="compressed-tensors")
    with pytest.raises(
        PlanError, match="decodes its weights while it loads, and passes over what it says of the cache"
    ):
        planned(WHOLE | {"target": {"bits": 4, "symmetric": False}}, FP8, export="compressed-tensors")


@pytest.mark.parametrize("seen", [True, False])
def test_the_plan_says_who_rounds(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    monkeypatch.setattr(cache_scheme, "found_by_transformers", lambda *_: seen)
    plan = api.plan(tiny("llama"), recipe=recipe(FP8), device="cpu", tokens=64, samples=4)
    words = "transformers rounds them and stores" if seen else "transformers would keep them as they are"
    assert [x for x in plan.notes if words in x]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": "attn_head"}, r"8-bit float by attn_head, static, which is not computed here"),
        ({"type": "int"}, "8-bit int by tensor, static"),
        ({"dynamic": True}, "8-bit float by tensor, dynamic"),
    ],
)
def test_another_cache_is_refused(written: Callable[..., Path], tmp_path: Path, change: Any, words: str) -> None:
    folder = tmp_path / "other"
    shutil.copytree(written(FP8), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=words):
        open_model(folder)


def test_a_folder_without_its_scales_is_refused(written: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(written(FP8), folder)
    tensors = load_file(folder / "model.safetensors")
    one = {name: x for name, x in tensors.items() if not name.endswith("v_scale")}
    none = {name: x for name, x in one.items() if not name.endswith("k_scale")}
    for left, words in ((one, r"self_attn\.v_scale is missing"), (none, "has a kv_cache_scheme with static scales")):
        save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SourceError, match=words):
            open_model(folder)
