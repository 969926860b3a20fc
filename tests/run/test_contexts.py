"""A budget of bytes for the folder and the keys and values of one sequence: what is counted, chosen, kept to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from typer.testing import CliRunner

from lilliput import api
from lilliput.anatomy.cached import argument
from lilliput.cli.main import app
from lilliput.errors import PlanError
from lilliput.model.stored import Model, open_model
from lilliput.plan import choices
from lilliput.plan.contexts import Context
from lilliput.plan.plan import Plan, make
from lilliput.progress import Quiet
from lilliput.recipe.schema import Recipe, Step
from lilliput.run import choosing, passes, sizing, trying
from lilliput.run.journal import Work
from lilliput.runtime import caches
from lilliput.runtime.caches.codec import PairCodec
from lilliput.runtime.caches.hooks import attention_of
from lilliput.runtime.caches.kivi import KiviSpec
from lilliput.target import Target

Tiny = Callable[[str], Path]
IDS = torch.randint(0, 48, (3, 40), generator=torch.Generator().manual_seed(1))
MENU = ("int2/8/asym", "int4/8/asym", "int8/8/asym")
CONTEXT = 64
SMALL: dict[str, Any] = {"residual": 8, "sinks": 1, "caches": (8, 4, 2)}
TOKENS, BUDGET = 200, 260_000
ASKED: dict[str, Any] = {
    "context": TOKENS, "menu": ("int2/32/asym", "int4/32/asym", "int8/32/asym"), "samples": 4, "tokens": 96,
    "device": "cpu", "settings": ("menu.residual=32", "menu.trial_samples=1"),
}  # fmt: skip


def planned(model: Model, *more: Step, tokens: int = 40, **options: object) -> Plan:
    asked = {"menu": MENU, "context": CONTEXT, "trial_samples": 1, **SMALL, **options}
    solver = Step(method="gptq", target=Target(bits=2, group_size="channel", symmetric=False))
    recipe = Recipe(steps=(Step(method="menu", options=asked), solver, *more))
    return make(model, recipe, samples=3, tokens=tokens, budget=None, size=None, seed=None, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks with heads of 8 channels and noise on all weights; no tokenizer."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    folder = tmp_path_factory.mktemp("narrow")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(folder: Path) -> Model:
    return open_model(str(folder))


def counted(plan: Plan) -> Context:
    assert plan.context is not None
    return plan.context


def measured(plan: Plan, model: Model, out: Path) -> dict[str, tuple[float, ...]]:
    (task,) = choices.steps(plan)
    with torch.no_grad(), Work(out, "key") as work:
        choosing.measure(plan, task, model, IDS, work, Quiet())
        return dict(choosing.predictions(plan, task, work).losses)


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


def least(model: Model, monkeypatch: pytest.MonkeyPatch) -> int:
    """The smallest size that a refusal names."""
    monkeypatch.setattr(choices, "original", lambda _: 10**9)  # files beside the weights outweigh so small a model
    plan = planned(model, size=1000)
    (task,) = choices.steps(plan)
    with pytest.raises(
        PlanError, match=r"makes is (\d+) bytes.* keys and values of 64 tokens, at the fewest"
    ) as refused:
        choices.feasible(plan, model, task, sizing.sizer(plan, task, model))
    return int(str(refused.value).partition("makes is ")[2].split()[0])


def test_a_size_that_is_too_small_is_refused_with_one_that_can_be_made(
    source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "original", lambda _: 10**9)  # files beside the weights outweigh so small a model
    plan = planned(source, size=1000)
    (task,) = choices.steps(plan)
    with pytest.raises(
        PlanError, match=r"makes is (\d+) bytes.* keys and values of 64 tokens, at the fewest"
    ) as refused:
        choices.feasible(plan, source, task, sizing.sizer(plan, task, source))
    size = int(str(refused.value).partition("makes is ")[2].split()[0])
    assert size > counted(plan).bytes
    plan = planned(source, size=size)
    (task,) = choices.steps(plan)
    choices.feasible(plan, source, task, sizing.sizer(plan, task, source))
    with torch.no_grad(), Work(tmp_path / "out", "key") as work:
        made = choosing.run(plan, task, source, IDS, work, Quiet())
    assert made.whole_bytes <= size
    assert counted(made).bytes == counted(plan).bytes


def test_bits_go_to_the_block_whose_keys_matter(folder: Path, tmp_path: Path) -> None:
    """Queries eight times as large make what is wrong with a block's keys eight times as wrong."""
    model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.1)  # or it would matter most whatever its keys are
    for sharp in (0, 1, 2):
        factors = [8.0 if n == sharp else 0.25 for n in range(3)]
        with torch.no_grad():
            for layer, factor in zip(model.model.layers, factors, strict=True):
                layer.self_attn.q_proj.weight.mul_(factor)
        model.save_pretrained(tmp_path / f"sharp-{sharp}")
        with torch.no_grad():
            for layer, factor in zip(model.model.layers, factors, strict=True):
                layer.self_attn.q_proj.weight.div_(factor)
        changed = open_model(str(tmp_path / f"sharp-{sharp}"))
        plan = planned(changed, size=10**6)
        context, losses = counted(plan), measured(plan, changed, tmp_path / f"out-{sharp}")
        items = context.items(losses)
        print([(x.name, [(y.bytes, y.loss) for y in x.options]) for x in items])
        two, four = sorted(x.bytes for x in items[0].options)[:2]
        room = 2 * two + four  # one block can have more than the fewest
        chosen = choices.choice.choose(items, room)
        assert chosen is not None
        got = [x.options[j].bytes for x, j in zip(items, chosen.picks, strict=True)]
        assert got == [four if n == sharp else two for n in range(3)]


def test_losses_and_errors_are_those_of_the_whole_model(source: Model, folder: Path, tmp_path: Path) -> None:
    """Against transformers' own model that reads the sample piece by piece, one block with a compressed cache."""
    plan = planned(source, size=10**6)
    context = counted(plan)
    (task,) = choices.steps(plan)
    with torch.no_grad(), Work(tmp_path / "out", "key") as work:
        choosing.measure(plan, task, source, IDS, work, Quiet())
        (record,) = work.find("trial")
        errors = passes.recorded(task, work)
    tried = trying.trying(plan, task)
    few, _ = trying.split(plan, task, IDS)
    whole_model: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, group in enumerate(tried.groups):
        if group.role != trying.CACHE:
            continue
        kept = context.of_block(group.block)
        assert kept is not None
        plain, before = read(whole_model, few, context.chunk, group.block, None)
        for entry, spec in kept.specs.items():
            other, after = read(whole_model, few, context.chunk, group.block, spec)
            assert errors[kept.name][entry] == pytest.approx(
                float((after - before)[:, context.first :].double().square().sum()),
                rel=0.01
                if entry > 1
                else 0.5,  # of 8 bits little is left, and a scale that rounds otherwise is much of it
            )
            if entry == tried.entry[kept.name]:
                kl = (plain.exp() * (plain - other)).sum(-1)[:, context.first :].mean()
                assert record["losses"][tried.first + number - 1] == pytest.approx(float(kl), rel=1e-2, abs=1e-8)


def read(model: Any, ids: Tensor, chunk: int, block: int, spec: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and what the block's attention gives, both [samples, tokens, width]."""
    layer = model.model.layers[block]
    attention = layer.get_submodule(attention_of(layer))
    seen: list[Tensor] = []
    logits: list[Tensor] = []
    shape = caches.codec.CacheShape(2, 8, 8)
    handle = attention.register_forward_hook(lambda _, __, given: seen.append(given[0]))
    cache, name = tf.DynamicCache(config=model.config), argument(model.forward)
    assert name is not None
    watching = None if spec is None else caches.tried(attention, lambda: spec.make(shape, {}), turned=False)
    with torch.no_grad():
        if watching is not None:
            watching.__enter__()
        for part in ids.split(chunk, dim=1):
            logits.append(model(part, use_cache=True, **{name: cache}).logits)
        if watching is not None:
            watching.__exit__(None, None, None)
    handle.remove()
    return torch.cat(logits, 1).log_softmax(-1), torch.cat(seen, 1)


def test_a_measuring_that_was_killed_anywhere_goes_on_to_the_same_choice(
    source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = least(source, monkeypatch) + 4000
    plan = planned(source, size=size)
    (task,) = choices.steps(plan)

    class _KilledError(Exception):
        pass

    class _Killed(Work):
        left = 0

        def note(self, record: Mapping[str, Any]) -> None:
            super().note(record)
            if self.left == 0:
                raise _KilledError
            self.left -= 1

    with torch.no_grad():
        with Work(tmp_path / "whole", "key") as work:
            made = choosing.run(plan, task, source, IDS, work, Quiet())
        for after in range(3 + 2):  # blocks, trials, tables
            out = tmp_path / f"killed-{after}"
            with _Killed(out, "key") as work:
                work.left = after
                with pytest.raises(_KilledError):
                    choosing.run(plan, task, source, IDS, work, Quiet())
            with Work(out, "key") as work:
                again = choosing.run(plan, task, source, IDS, work, Quiet())
                assert (again.notes, again.resolved.recipe) == (made.notes, made.resolved.recipe)
                assert again.quantization_config == made.quantization_config
                assert choosing.again(plan, task, source, work).whole_bytes == made.whole_bytes <= size
                assert not list(work.folder.glob("trial-*"))


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


def test_a_frontier_is_of_folder_and_cache_together(source: Model, tmp_path: Path) -> None:
    plan = planned(source, size=10**6)
    (task,) = choices.steps(plan)
    with torch.no_grad(), Work(tmp_path / "out", "key") as work:
        choosing.measure(plan, task, source, IDS, work, Quiet())
        predictions = choosing.predictions(plan, task, work)
    curve = choices.frontier(plan, source, task, predictions, 5, lambda made: made)
    first, last = curve[0], curve[-1]
    assert first.caches == {"kivi2": 3}
    assert first.cache_bytes == counted(plan).bytes
    assert last.caches == {"plain": 3}
    assert last.cache_bytes == counted(plan).plain_bytes
    together = [x.folder_bytes + x.cache_bytes for x in curve]
    assert together == sorted(together)
    assert [x.kl for x in curve] == sorted((x.kl for x in curve), reverse=True)
    assert first.bits < last.bits < 12


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


def test_other_layouts_are_refused(source: Model) -> None:
    recipe = planned(source, size=10**6).resolved.recipe.model_copy(update={"export": "compressed-tensors"})
    with pytest.raises(PlanError, match="needs a layout that says how a model stores keys and values"):
        make(source, recipe, samples=3, tokens=40, budget=None, size=None, seed=None, dtype=torch.float32)


def test_a_context_without_a_size_is_refused_in_a_recipe(source: Model) -> None:
    plan = planned(source, average=4.0)
    (task,) = choices.steps(plan)
    with pytest.raises(PlanError, match="`context` counts keys and values in a `size`"):
        choices.feasible(plan, source, task, sizing.sizer(plan, task, source))


def test_where_no_entry_is_smaller_nothing_is_chosen(source: Model) -> None:
    context = counted(planned(source, context=4, size=10**6))
    assert context.choosing == ()
    assert context.bytes == context.plain_bytes


def test_a_cache_that_forgets_is_seen_by_the_trials(
    source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(source, size=10**6)
    before = measured(plan, source, tmp_path / "before")

    def nothing(codec: PairCodec) -> tuple[Tensor, Tensor]:
        keys, values = codec.keys.read(codec.dtype), codec.values.read(codec.dtype)
        return torch.zeros_like(keys), torch.zeros_like(values)

    monkeypatch.setattr(PairCodec, "materialise", nothing)
    after = measured(plan, source, tmp_path / "after")
    for x in counted(plan).choosing:
        assert after[x.name][1] > 100 * before[x.name][1] > 0
