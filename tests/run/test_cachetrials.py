"""What is measured and chosen for keys and values, on a model of three narrow blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from lilliput.anatomy.cached import argument
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
from lilliput.target import Target

IDS = torch.randint(0, 48, (3, 40), generator=torch.Generator().manual_seed(1))
MENU = ("int2/8/asym", "int4/8/asym", "int8/8/asym")
CONTEXT = 64
SMALL: dict[str, Any] = {"residual": 8, "sinks": 1, "caches": (8, 4, 2)}


def counted(plan: Plan) -> Context:
    assert plan.context is not None
    return plan.context


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


def measured(plan: Plan, model: Model, out: Path) -> dict[str, tuple[float, ...]]:
    (task,) = choices.steps(plan)
    with torch.no_grad(), Work(out, "key") as work:
        choosing.measure(plan, task, model, IDS, work, Quiet())
        return dict(choosing.predictions(plan, task, work).losses)


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
