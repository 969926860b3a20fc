"""A recipe with a step for the cache, from plan to folder, and the evaluation of that folder through its cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput import api
from lilliput.anatomy.cached import argument
from lilliput.data import load_tokens
from lilliput.efficiency import count
from lilliput.efficiency import device as find_device
from lilliput.efficiency.roofline import operators, workload
from lilliput.errors import PlanError, SourceError
from lilliput.methods.cache import kvquant
from lilliput.metrics.evaluate import evaluate
from lilliput.model.stored import caches_of, open_model
from lilliput.parts.linear import CACHES, parse_config
from lilliput.run.journal import Work
from lilliput.runtime import caches
from lilliput.runtime.caches.codec import PairCodec
from lilliput.streaming import backward
from lilliput.verbs.cache import CacheIO

Tiny = Callable[[str], Path]
Write = Callable[..., Path]
TOKENS, WINDOWS = 96, 2


def recipe(*steps: dict[str, Any]) -> str:
    return "steps:\n" + "".join(f"- {json.dumps(x)}\n" for x in steps)


KIVI = {"method": "kivi", "target": {"bits": 2}, "options": {"residual": 32}}
RTN = {"method": "kv-rtn", "target": {"bits": 2}}
KVQUANT = {"method": "kvquant", "target": {"bits": 2}}
WKV = {"method": "wkvquant", "target": {"bits": 2}}
WINDOW = {"method": "sink-window", "options": {"sinks": 2, "window": 20}}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """Every second layer sees a window of 16 tokens."""
    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    config = tf.Gemma2Config(
        vocab_size=512, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=4, intermediate_size=64, sliding_window=16, max_position_embeddings=256,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    model.save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tiny: Tiny, gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    made: dict[tuple[str, str], Path] = {}

    def write(name: str, *steps: dict[str, Any]) -> Path:
        text = recipe(*steps)
        if (name, text) not in made:
            model = gemma if name == "gemma" else tiny(name)
            out = tmp_path_factory.mktemp("written") / "out"
            api.compress(model, out, recipe=text, samples=4, tokens=64, eval_windows=0, device="cpu")
            made[name, text] = out
        return made[name, text]

    return write


def direct(folder: Path, ids: Tensor, chunk: int) -> float:
    """Perplexity by transformers' own model, which reads each window piece by piece into the cache that it makes."""
    model: Any = api.load(folder, dtype=torch.float32)
    name, total = argument(model.forward), 0.0
    assert name is not None
    with torch.no_grad():
        for window in ids:
            cache, logits = tf.DynamicCache(config=model.config), []
            for part in window[None].split(chunk, dim=1):
                logits.append(model(part, use_cache=True, **{name: cache}).logits)
            nll = torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0, :-1].double(), window[1:])
            total += float(nll)
    return math.exp(total / len(ids))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("llama", RTN), ("llama", KIVI), ("llama", KVQUANT), ("llama", WKV), ("llama", WINDOW), ("qwen2", KVQUANT),
        ("gpt2", KIVI), ("gpt2", KVQUANT), ("neox", KVQUANT), ("gemma", KIVI), ("mixtral", KIVI),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [32, 128])
def test_a_streamed_evaluation_is_that_of_the_whole_model(written: Write, name: str, step: Any, chunk: int) -> None:
    """Block by block or all at once, a token sees what the cache holds."""
    folder = written(name, step)
    found = evaluate(folder, windows=WINDOWS, tokens=TOKENS, chunk=chunk)
    model = open_model(folder)
    ids = load_tokens("docs:library", model.source.tokenizer(), samples=WINDOWS, tokens=TOKENS).ids
    assert found.perplexity.value == pytest.approx(direct(folder, ids, chunk), rel=2e-5)
    assert found.cache is not None
    assert found.cache.chunk == min(chunk, TOKENS)
    assert f"read {min(chunk, TOKENS)} tokens at a time" in found.notes[0]
    with caches.paused(model.skeleton.model):
        plain = evaluate(model, windows=WINDOWS, tokens=TOKENS)
    if chunk < TOKENS or step is RTN:
        assert found.perplexity.value != plain.perplexity.value


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_can_weigh_by_squared_gradients(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Keys before their rotation and values of every block, by autograd through the whole of transformers' model."""
    seen: list[CacheIO] = []
    fit = kvquant.fit
    monkeypatch.setitem(vars(kvquant.METHOD), "fit", lambda io, *a: (seen.append(io), fit(io, *a))[1])
    step = {"method": "kvquant", "target": {"bits": 2}, "options": {"weigh": "fisher", "samples": 3, "sinks": 2}}
    done = api.compress(
        tiny(name), tmp_path / "out", recipe=recipe(step), samples=4, tokens=24, eval_windows=0, device="cpu",
        dtype="float32",
    )  # fmt: skip
    assert done.plan.samples == 4
    model = tf.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    source = open_model(tiny(name))
    ids = load_tokens("docs", source.source.tokenizer(), samples=4, tokens=24).ids[:3]
    found: list[Tensor] = []
    ends = ("k_proj", "v_proj", "c_attn")

    def keep(module: Any, args: Any, out: Tensor) -> None:
        out.retain_grad()
        found.append(out)

    for path, module in model.named_modules():
        if path.endswith(ends):
            module.register_forward_hook(keep)
    loss = torch.nn.functional.cross_entropy(
        model(ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()  # type: ignore[no-untyped-call]
    slopes = [x.grad for x in found if x.grad is not None]
    if name == "gpt2":
        slopes = [part for x in slopes for part in x.chunk(3, -1)[1:]]
    assert len(seen) == len(slopes) // 2 == len(source.skeleton.block_names)
    for n, io in enumerate(seen):
        for own, other in zip((io.key_weights, io.value_weights), slopes[2 * n : 2 * n + 2], strict=True):
            assert own is not None
            wanted = other[:, 2:].flatten(0, 1).view(own.shape).square()
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))
    assert not list((tmp_path).rglob("slopes-*.bin"))


def test_gradients_for_a_cache_are_taken_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies in a block goes on with the files of its pass, and ends with the same bytes."""
    step = {"method": "kvquant", "target": {"bits": 2}, "options": {"weigh": "fisher", "samples": 2}}
    steps = recipe({"method": "rtn", "target": {"bits": 4}}, step)
    passes: list[None] = []
    fisher, note = backward.fisher, Work.note
    monkeypatch.setattr(backward, "fisher", lambda *a, **k: (passes.append(None), fisher(*a, **k))[1])

    def run(out: Path) -> bytes:
        api.compress(tiny("llama"), out, recipe=steps, samples=2, tokens=24, eval_windows=0, device="cpu")
        return (out / "model.safetensors").read_bytes()

    whole = run(tmp_path / "whole")

    def dying(self: Work, record: Any) -> None:
        note(self, record)
        if record["kind"] == "block" and record["block"] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "note", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "again")
    passes.clear()
    assert run(tmp_path / "again") == whole
    assert not passes


@pytest.fixture
def destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(codec: PairCodec) -> tuple[Tensor, Tensor]:
        keys, values = codec.keys.read(codec.dtype), codec.values.read(codec.dtype)
        return torch.zeros_like(keys), 50 * torch.ones_like(values)

    monkeypatch.setattr(PairCodec, "materialise", nothing)


@pytest.mark.usefixtures("destroyed")
def test_a_cache_that_forgets_ruins_every_figure(written: Write, tiny: Tiny) -> None:
    ruined = evaluate(written("llama", KIVI), tiny("llama"), windows=WINDOWS, tokens=TOKENS, chunk=16)
    assert ruined.kl is not None
    assert ruined.agreement is not None
    assert ruined.kl.value > 0.2
    assert ruined.agreement.value < 0.9
    whole = evaluate(written("llama", KIVI), tiny("llama"), windows=WINDOWS, tokens=TOKENS, chunk=TOKENS)
    assert whole.kl is not None
    assert whole.kl.value < 1e-6  # nothing is read from it


def test_an_unquantized_model_becomes_a_folder_whose_config_says_it(written: Write, tiny: Tiny) -> None:
    folder = written("llama", KIVI)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (entry["version"], entry["linears"]) == (CACHES, {})
    assert parse_config(entry) == {}
    (cache,) = entry["caches"]
    assert cache == {
        "kind": "kivi", "bits": 2, "value_bits": 2, "group_size": 16, "residual": 32, "rotate": False, "sinks": 0,
        "shape": [2, 16, 16], "attention": "self_attn", "blocks": [f"model.layers.{n}" for n in range(4)],
    }  # fmt: skip
    before, after = open_model(tiny("llama")), open_model(folder)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.refs)
    with pytest.raises(PlanError, match="stores keys and values compressed, and would be written without that"):
        api.plan(folder, recipe="w4", tokens=64, samples=4)
    with pytest.raises(PlanError, match="stores keys and values compressed, which a folder as"):
        api.convert(folder, folder.parent / "x.gguf", to="gguf")
    with pytest.raises(SourceError, match="version 99"):
        parse_config(entry | {"version": 99})


def test_layers_may_differ_and_the_last_step_has_them(written: Write) -> None:
    folder = written(
        "llama",
        {"method": "rtn", "target": {"bits": 8}},
        {"method": "kv-rtn", "target": {"bits": 8}},
        {"method": "kvquant", "target": {"bits": 3}, "options": {"layers": [0]}},
        {"method": "kivi", "target": {"bits": 4, "group_size": 8}, "options": {"layers": [-1], "value_bits": 2}},
    )
    found = {x["kind"]: x["blocks"] for x in caches_of(open_model(folder).source)}
    layers = [f"model.layers.{n}" for n in range(4)]
    assert found == {"kvquant": layers[:1], "kv-rtn": layers[1:3], "kivi": layers[3:]}
    stored = open_model(folder).source.stored
    assert stored["model.layers.0.self_attn.key_cache_levels"].shape == (2, 8)
    assert not [name for name in stored if "cache_" in name and "layers.0" not in name]


@pytest.mark.parametrize(("name", "turned"), [("llama", True), ("neox", True), ("gpt2", False)])
def test_keys_are_turned_back_where_the_model_rotates_them(written: Write, name: str, turned: bool) -> None:
    (cache,) = caches_of(open_model(written(name, KVQUANT)).source)
    assert cache["turned"] is turned


def test_static_ranges_are_of_keys_before_their_rotation(tiny: Tiny, tmp_path: Path) -> None:
    """A channel's centre over all samples is that of what its projection gives."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(f"word {n * n} and {n}," for n in range(400)))
    api.compress(tiny("llama"), out, recipe=recipe(KVQUANT), data=text, samples=4, tokens=64, eval_windows=0)
    source = open_model(out).source
    model: Any = tf.AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    ids = load_tokens(text, source.tokenizer(), samples=4, tokens=64).ids
    seen: list[Tensor] = []
    projection = model.model.layers[0].self_attn.k_proj
    projection.register_forward_hook(lambda _, __, given: seen.append(given[:, 1:].flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    count = int(0.01 * len(seen[0]) / 2)
    ordered = seen[0].sort(0).values
    centre = (ordered[count] + ordered[-1 - count]) / 2
    found = source.read("model.layers.0.self_attn.key_cache_centre").flatten()
    torch.testing.assert_close(found, centre, rtol=0.02, atol=0.02 * float(centre.abs().max()))


@pytest.mark.parametrize("step", [RTN, KIVI, KVQUANT, WKV, WINDOW], ids=lambda x: x["method"])
def test_bytes_in_memory_are_those_reported(written: Write, step: Any) -> None:
    folder = written("llama", step)
    model: Any = api.load(folder, dtype=torch.float32)
    ids = torch.arange(90)[None].repeat(3, 1)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[argument(model.forward)]
    for layer in cache.layers:
        layer.crop(0)
    held = sum(layer.codec.held_bits() for layer in cache.layers)
    assert held == 3 * caches.size_bits(caches_of(open_model(folder).source), 90, 32)
    found = evaluate(folder, windows=2, tokens=90)
    assert found.cache is not None
    assert 8 * found.cache.bytes == held // 3
    assert found.cache.plain_bytes == 4 * 90 * 2 * 32 * 4
    assert found.to_json()["cache"]["bytes"] == found.cache.bytes
    counts = count(open_model(folder), context=90)
    assert counts.kv_bytes_per_token == round(found.cache.bytes / 90)


def test_a_roofline_counts_the_compressed_cache(written: Write, tiny: Tiny) -> None:
    device = find_device("h100")
    context = 200
    own, plain = (
        next(
            x
            for x in operators(workload(open_model(folder), device), device, "decode", 3, context)
            if x.name == "kv cache"
        )
        for folder in (written("llama", KIVI), tiny("llama"))
    )
    held = caches.size_bits(caches_of(open_model(written("llama", KIVI)).source), context, 16) / 8
    whole = 4 * 64 * context * 2
    # Stored, read, and decoded into what a plain cache holds, which is written and read.
    assert own.bytes == pytest.approx(3 * (held * (1 + 1 / context) + 2 * whole))
    assert plain.bytes == pytest.approx(3 * whole * (1 + 1 / context))


def test_windows_keep_their_cache_and_are_named(gemma: Path, written: Write) -> None:
    plan = api.plan(gemma, recipe=recipe(KIVI), device="cpu", tokens=64, samples=4)
    assert any(x.startswith("Keys and values of 4096 tokens take ") for x in plan.notes)
    assert any("2 of 4 blocks keep keys and values as they are: model.layers.0" in x for x in plan.notes)
    found = evaluate(written("gemma", KIVI), windows=WINDOWS, tokens=TOKENS)
    assert found.cache is not None
    assert (found.cache.layers, found.cache.blocks) == (2, 4)
    with pytest.raises(PlanError, match=r"model\.layers\.2 keeps no growing cache.*DynamicSlidingWindowLayer"):
        api.plan(gemma, recipe=recipe(KIVI | {"options": {"layers": [1, 2]}}), device="cpu", tokens=64, samples=4)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [KIVI, {"method": "rtn"}],
            r"step 1 \(kivi\) says how the finished model stores.*step 2 \(rtn\) still changes",
        ),
        ([KIVI | {"options": {"layers": [9]}}], "there is no block 9: the model has 4"),
        ([KIVI | {"where": {"include": ["*.0.*"]}}], "`where` names linears: give `layers`"),
        ([KIVI | {"target": {"bits": 2, "sparsity": 0.5}}], "'sparsity' says nothing about a cache"),
        ([KIVI | {"target": {"bits": 2, "group_size": "tensor"}}], "a cache grows"),
        ([KIVI | {"options": {"residual": 20}}], "residual of 20 tokens is no multiple of groups of 16"),
        ([RTN | {"target": {"bits": 2, "group_size": 12}}], "a group of 12 does not divide the 16"),
        ([WINDOW | {"target": {"bits": 4}}], "'bits' says nothing about a cache"),
        ([{"method": "token-pruning"}, KIVI], "texts that are read in pieces"),
    ],
)
def test_what_cannot_be_is_refused_while_planning(tiny: Tiny, steps: list[Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        api.plan(tiny("llama"), recipe=recipe(*steps), device="cpu", tokens=64, samples=4)


def test_another_layout_is_refused(tiny: Tiny) -> None:
    with pytest.raises(PlanError, match="needs a layout that says how a model stores keys and values"):
        api.plan(
            tiny("llama"), recipe=recipe(KIVI) + "export: compressed-tensors\n", device="cpu", tokens=64, samples=4
        )


def test_gates_and_caches_go_together(written: Write, tiny: Tiny) -> None:
    folder = written("llama", {"method": "dynamic-pruning", "options": {"keep": 0.75, "channels": 16}}, KIVI)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert entry["version"] == CACHES
    assert entry["behaviours"]
    found = evaluate(folder, tiny("llama"), windows=WINDOWS, tokens=TOKENS, chunk=32)
    assert found.work is not None
    assert found.work.share < 1
    assert found.cache is not None
    ids = load_tokens("docs:library", open_model(folder).source.tokenizer(), samples=WINDOWS, tokens=TOKENS).ids
    assert found.perplexity.value == pytest.approx(direct(folder, ids, 32), rel=2e-5)
