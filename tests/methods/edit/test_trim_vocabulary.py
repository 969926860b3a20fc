"""trim-vocabulary against the original's logits, written out, and from plan to folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilliput import api, methods
from lilliput.attribution.attribute import attribute, suspects
from lilliput.data.load import used_tokens
from lilliput.errors import DataError, PlanError
from lilliput.export import provenance
from lilliput.model.edited import EditedModel, unedited, vocabulary_of
from lilliput.model.stored import open_model
from lilliput.progress import Quiet
from lilliput.recipe import texts
from lilliput.recipe.load import load
from lilliput.run.editing import prepared
from lilliput.run.journal import Work
from lilliput.source import open_source
from lilliput.tasks.instructions import compare_instructions
from lilliput.tasks.run import run_tasks

Tiny = Callable[[str], Path]
RUN: dict[str, Any] = {"samples": 4, "tokens": 32, "device": "cpu", "dtype": "float32", "progress": Quiet()}
WORDS = "These are some words about lists, dictionaries and classes in the library — naïve ones. " * 100


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


def recipe(text: Path, rest: str = "", **options: int) -> str:
    given = "".join(f", {key}: {value}" for key, value in options.items())
    return f"steps:\n  - {{method: trim-vocabulary, options: {{text: {text}{given}}}}}\n{rest}"


def kept_of(folder: Path, out: Path) -> list[int]:
    """The original's id of each token of the smaller folder, by its string."""
    ours, theirs = (AutoTokenizer.from_pretrained(x).get_vocab() for x in (out, folder))
    return [theirs[token] for token in sorted(ours, key=lambda x: ours[x])]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox"])
def test_logits_are_the_original_s_of_the_tokens_that_stay(tiny: Tiny, tmp_path: Path, text: Path, kind: str) -> None:
    folder, out = tiny(kind), tmp_path / "out"
    done = api.compress(folder, out, recipe=recipe(text, multiple=8), eval_windows=0, **RUN)
    assert done.plan.bytes == sum(x.stat().st_size for x in out.glob("*.safetensors"))
    assert done.engine is not None
    assert not done.engine.problems
    kept = kept_of(folder, out)
    assert kept == sorted(kept)
    assert len(kept) % 8 == 0
    assert len(kept) == json.loads((out / "config.json").read_text())["vocab_size"] < 512
    ours, theirs = (AutoTokenizer.from_pretrained(x) for x in (out, folder))
    ids = ours(WORDS)["input_ids"]
    assert ours.convert_ids_to_tokens(ids) == theirs.tokenize(WORDS)
    assert ours.eos_token_id == kept.index(theirs.eos_token_id)
    smaller, whole = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).eval() for x in (out, folder))
    window = torch.tensor(ids[:64])
    with torch.no_grad():
        logits = whole(torch.tensor(kept)[window][None]).logits[..., kept]
        torch.testing.assert_close(smaller(window[None]).logits, logits)
    told = ours("snowman ☃ and zebra", return_tensors="pt")["input_ids"]
    assert ours.decode(told[0]) == "snowman ☃ and zebra"
    assert smaller.generate(told, max_new_tokens=3, do_sample=False).shape[1] == told.shape[1] + 3


def test_an_evaluation_compares_the_tokens_that_both_have(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    """Against float64 written out: the original reads the same strings, and predicts among the tokens that stay."""
    folder, out = tiny("qwen2"), tmp_path / "out"
    done = api.compress(folder, out, recipe=recipe(text), eval_windows=2, **RUN).evaluation
    assert done is not None
    assert done.kl is not None
    assert abs(done.kl.value) < 1e-9
    assert done.agreement is not None
    assert done.agreement.value == 1.0
    kept = kept_of(folder, out)
    ids = torch.tensor(used_tokens("docs:library", AutoTokenizer.from_pretrained(out))[: 2 * 256]).view(2, 256)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = whole(torch.tensor(kept)[ids]).logits[..., kept].double()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, len(kept)), ids[:, 1:].reshape(-1))
    assert done.reference_perplexity is not None
    assert done.reference_perplexity.value == pytest.approx(float(nll.exp()), rel=1e-4)
    assert done.perplexity.value == pytest.approx(float(nll.exp()), rel=1e-4)
    (note,) = [x for x in done.notes if "tokens: the original is measured" in x]
    original = AutoTokenizer.from_pretrained(folder)
    before = sum(len(original(AutoTokenizer.from_pretrained(out).decode(x))["input_ids"]) for x in ids)
    assert f"{len(kept)} of the original's 512 tokens" in note
    assert f"takes 512 of them where it took {before}" in note
    with pytest.raises(DataError, match="cannot be compared"):
        api.evaluate(folder, against=out, windows=2)


def test_steps_that_follow_read_text_in_the_smaller_vocabulary(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    rest = (
        "  - {method: flap, options: {ratio: 0.25}}\n  - {method: refit}\n  - {method: distil, options: {iters: 2}}\n"
        "  - {method: gptq, target: {bits: 4, group_size: 16}}\n"
    )
    done = api.compress(tiny("llama"), tmp_path / "out", recipe=recipe(text, rest), eval_windows=2, **RUN)
    assert done.plan.bytes == sum(x.stat().st_size for x in (tmp_path / "out").glob("*.safetensors"))
    assert done.evaluation is not None
    assert done.evaluation.kl is not None
    assert api.verify(tmp_path / "out").problems == ()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] < 512


def test_a_stopped_run_goes_on_and_another_text_is_another_run(
    tiny: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = recipe(text, "  - {method: gptq, target: {bits: 4, group_size: 16}}\n", multiple=1)
    api.compress(tiny("llama"), tmp_path / "whole", recipe=steps, eval_windows=0, **RUN)
    note = Work.note

    def stopped(self: Work, record: dict[str, Any]) -> Any:
        if record["kind"] == "block" and record["block"] == 1:
            raise KeyboardInterrupt
        return note(self, record)

    monkeypatch.setattr(Work, "note", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.compress(tiny("llama"), tmp_path / "out", recipe=steps, eval_windows=0, **RUN)
    monkeypatch.undo()
    api.compress(tiny("llama"), tmp_path / "out", recipe=steps, eval_windows=0, **RUN)
    for path in (tmp_path / "whole").glob("*"):
        if path.name not in ("README.md", "lilliput.json"):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    first = api.plan(tiny("llama"), recipe=steps, samples=4, tokens=32)
    text.write_text("Other words: zebras.", encoding="utf-8")
    assert api.plan(tiny("llama"), recipe=steps, samples=4, tokens=32).hash("none") != first.hash("none")


def test_tables_are_read_row_by_row_as_they_are_whole(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    steps = tmp_path / "r.yaml"
    steps.write_text(recipe(text, "  - {method: flap, options: {ratio: 0.25}}\n"))
    model = prepared(open_model(tiny("qwen2")), load(steps))
    kept = vocabulary_of(model)
    assert kept is not None
    original = unedited(model)
    assert isinstance(original, EditedModel)
    assert original.edit.vocabulary == kept
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        value = open_model(tiny("qwen2")).read(name)[list(kept)]
        assert torch.equal(model.read(name), value)
        assert torch.equal(model.read_rows(name, 5, 90), value[5:90])
        rows = torch.tensor([0, 7, 80])
        seen = [n for a, b in model.spans(name, rows) for n in range(a, b)]
        assert {0, 7, 80} <= set(seen)


def test_as_many_tokens_stay_as_are_asked_for(tiny: Tiny, text: Path) -> None:
    spec = methods.get("trim-vocabulary")
    source = open_source(str(tiny("llama")))

    def kept(**options: int) -> tuple[int, ...]:
        found: tuple[int, ...] = spec.spec.vocabulary(source, "docs", spec.parse({"text": str(text), **options}))  # type: ignore[attr-defined]
        return found

    needed = kept(multiple=1)
    assert set(needed) <= set(kept(tokens=400, multiple=1))
    assert len(kept(tokens=400, multiple=1)) == 400
    assert len(kept(tokens=401, multiple=16)) == 416
    assert kept(tokens=512) == tuple(range(512))


def test_what_it_cannot_do_is_refused(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    late = f"steps:\n  - {{method: flap}}\n  - {{method: trim-vocabulary, options: {{text: {text}}}}}\n"
    with pytest.raises(PlanError, match="move it in front of"):
        api.plan(tiny("llama"), recipe=late)
    with pytest.raises(PlanError, match="give it a `text`"):
        api.plan(tiny("llama"), recipe="trim-vocabulary", data="self")
    with pytest.raises(DataError, match="there is no file"):
        api.plan(tiny("llama"), recipe=recipe(tmp_path / "none.txt"))


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_tasks_compare_the_tokens_that_both_have(tiny: Tiny, tmp_path: Path, text: Path, kind: str) -> None:
    """A model that lost nothing but tokens answers as the original does among these, on text that it cuts anew too."""
    folder, out = tiny(kind), tmp_path / "out"
    api.compress(folder, out, recipe=recipe(text), eval_windows=0, **RUN)
    rows = [{"context": f"Some {x} of the", "target": y} for x, y in (("lists", "zebra"), ("quartz", "library"))]
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    asked = [{"prompt": x, "answer": "y"} for x in ("These are", "Zebras in")]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(x) + "\n" for x in asked), encoding="utf-8")
    found = run_tasks(out, folder, [f"{x}={tmp_path / x}.jsonl" for x in ("lambada", "my")])
    perplexity = found[0].also["perplexity"]
    assert perplexity["ratio"].value == pytest.approx(1.0, rel=1e-5)
    kept = kept_of(folder, out)
    tokenizer, whole = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(folder).double().eval()
    lost = []
    for row in rows:
        before, ids = (
            tokenizer(row["context"])["input_ids"],
            tokenizer(f"{row['context']} {row['target']}")["input_ids"],
        )
        with torch.no_grad():
            logits = whole(torch.tensor(kept)[ids][None]).logits[0, :, kept].log_softmax(-1)
        lost.append(-sum(float(logits[n - 1, ids[n]]) for n in range(len(before), len(ids))))
    assert perplexity["base"].value == pytest.approx(math.exp(sum(lost) / len(lost)), rel=1e-3)
    assert any(f"{len(kept):,} tokens that the model has" in x for x in found[0].notes)
    told = compare_instructions(out, folder, instructions(tmp_path), tokens=4)
    assert told.identical.value == 1.0
    assert "that the model has" in told.note


def instructions(folder: Path) -> Path:
    rows = [
        {"question_id": n, "turns": [x], "category": "x"} for n, x in enumerate(("These are", "Zebras in", "Lists"))
    ]
    path = folder / "instructions.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    return path


def test_what_cannot_be_narrowed_is_named(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    """A base whose embedding is packed, of more tokens than the model."""
    out, packed = tmp_path / "out", tmp_path / "packed"
    api.compress(tiny("llama"), out, recipe=recipe(text), eval_windows=0, **RUN)
    steps = (
        "export: lilliput\nsteps:\n  - {method: rtn, target: {bits: 4, group_size: 32}, where: {include: [embed]}}\n"
    )
    api.compress(tiny("llama"), packed, recipe=steps, eval_windows=0, **RUN)
    rows = [{"context": "Some lists of the", "target": x} for x in ("words", "library")]
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    with pytest.raises(DataError, match="its embedding or head is packed"):
        run_tasks(out, packed, [f"lambada={tmp_path / 'lambada'}.jsonl"])


def test_attribution_takes_the_tokens_that_both_have(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    folder, out = tiny("llama"), tmp_path / "out"
    steps = "  - {method: rtn, target: {bits: 3, group_size: 32}, where: {include: ['*layers.1.mlp.*']}}\n"
    api.compress(folder, out, recipe=recipe(text, steps), eval_windows=0, **RUN)
    found = attribute(out, folder, data=str(text), windows=2, tokens=32)
    assert found.total_kl > 0
    shares = [x["share"] for x in found.blocks]
    assert shares[1] == pytest.approx(1.0, abs=1e-4)
    assert max(abs(x) for n, x in enumerate(shares) if n != 1) < 1e-4
    assert any("of the original's 512 tokens" in x for x in found.notes)
    assert {x.linear for x in suspects(out, folder)} == {f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")}


def test_a_written_folder_says_which_text_it_was_and_not_where_it_lay(tiny: Tiny, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    api.compress(tiny("llama"), out, recipe=recipe(text), eval_windows=0, **RUN)
    record = json.loads((out / "lilliput.json").read_text(encoding="utf-8"))
    assert record["recipe"]["steps"][0]["options"]["text"] == "words.txt"
    assert record["files"] == {"words.txt": hashlib.sha256(WORDS.encode()).hexdigest()}
    for path in (*out.glob("*.json"), *out.glob("*.md")):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path.name
    assert provenance.read(out) is not None
    named = load("steps:\n  - {method: trim-vocabulary, options: {text: 'docs:library'}}\n")
    assert texts.portable(named) == named
    assert texts.hashed(named) == ()
