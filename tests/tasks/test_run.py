import json
import shutil
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from lilliput.data.tokens import Tokens
from lilliput.errors import DataError, PlanError, SourceError
from lilliput.progress import Progress
from lilliput.tasks import run
from lilliput.tasks.decode import greedy
from lilliput.tasks.files import load_task, parse
from lilliput.tasks.likelihood import log_likelihoods
from lilliput.tasks.run import loaded, overlap_note, run_tasks

WORDS = ["names", "objects", "statement", "class", "value", "module", "assignment", "expression"]


@pytest.fixture
def specs(jsonl):
    piqa = [
        {"goal": f"Bind {a}", "sol1": f"Use the {b}.", "sol2": f"Use the {c}.", "label": i % 2}
        for i, (a, b, c) in enumerate((a, b, c) for a in WORDS for b, c in pairwise(WORDS[:5]))
    ]
    lambada = [{"context": f"The {a} of the", "target": b} for a, b in pairwise(WORDS)]
    own = [{"prompt": f"Say {a}:", "answer": a} for a in WORDS[:4]]
    files = {"piqa": piqa, "lambada": lambada, "my": own}
    return [f"{name}={jsonl(f'{name}.jsonl', *rows)}" for name, rows in files.items()]


def test_a_model_against_another(tiny, noisy, specs):
    rows = run_tasks(noisy, tiny("llama"), specs)
    assert [(x.name, x.kind, x.items, x.metric) for x in rows] == [
        ("piqa", "choice", 32, "acc"),
        ("lambada", "cloze", 7, "acc"),
        ("my", "generate", 4, "exact_match"),
    ]
    piqa, lambada, _ = rows
    # The scores are those of each model by itself.
    for folder, found in ((noisy, piqa.ours), (tiny("llama"), piqa.base)):
        with loaded(folder) as model:
            task = load_task(parse(specs[0]))
            scores = task.kind.measure(model, task.shape, task.items, lambda done, total: None)
        assert found is not None
        assert found.value == pytest.approx(sum(scores["acc"]) / 32)
    assert piqa.flips is not None
    assert piqa.flips.lost + piqa.flips.won > 0
    assert piqa.difference is not None
    assert piqa.base is not None
    assert piqa.difference.value == pytest.approx(piqa.ours.value - piqa.base.value)
    assert lambada.also["perplexity"]["ratio"].value != 1.0
    json.dumps([x.to_json() for x in rows])


def test_a_model_against_itself_has_no_flips(tiny, specs):
    for row in run_tasks(tiny("llama"), tiny("llama"), specs, limit=3):
        assert row.flips is not None
        assert (row.items, row.flips.lost, row.flips.won, row.p_holm) == (3, 0, 0, 1.0)
        assert row.level == "unsure"


def test_an_interrupted_run_goes_on_at_the_item(tiny, specs, tmp_path):
    whole = run_tasks(tiny("llama"), None, specs)
    passes = []

    class Cut(Progress):
        def step(self, done, total, note=""):
            passes.append((done, total, note))
            if "lambada" in note and done == total:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(tiny("llama"), None, specs, work=tmp_path / "work", progress=Cut())
    passes.clear()

    class Seen(Progress):
        def step(self, done, total, note=""):
            passes.append((done, total, note.partition(",")[0]))

    again = run_tasks(tiny("llama"), None, specs, work=tmp_path / "work", progress=Seen())
    assert again == whole
    # Nothing of the first two tasks is done again, all of the third is.
    assert [x for x in passes if x[2] != "my"] == [(64, 64, "piqa"), (7, 7, "lambada")]
    assert (0, 4, "my") in passes


def test_models_with_different_tokenizers_are_refused(tiny, tmp_path, specs):
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    path = other / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="different vocabularies"):
        run_tasks(other, tiny("llama"), specs)
    data["model"]["vocab"] = json.loads((tiny("llama") / "tokenizer.json").read_text())["model"]["vocab"]
    data["model"]["merges"] = data["model"]["merges"][:100]
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="cut an item of 'piqa' into different tokens"):
        run_tasks(other, tiny("llama"), specs)


def test_calibration_text_among_the_items_is_said(tiny, jsonl):
    seen = "The assignment statement binds names to objects in the namespace, and it evaluates the expression list"
    rows = [
        {"context": seen, "target": "first"},
        {"context": "Nothing of this was ever in there, or so", "target": "it"},
    ]
    path = jsonl("l.jsonl", *rows)
    task = load_task(parse(f"lambada={path}"))
    with loaded(tiny("llama")) as model:
        tokenizer = model.tokenizer
    ids = tokenizer("Before it. " + seen + ". After it", return_tensors="pt")["input_ids"]
    note = overlap_note(task, tokenizer, Tokens.of(ids, "mine.txt"))
    assert note.startswith("1 of 2 items share 13 tokens or more with the calibration text 'mine.txt'")
    clean = Tokens.of(tokenizer("something else " * 30, return_tensors="pt")["input_ids"], "mine.txt")
    assert overlap_note(task, tokenizer, clean) == ""
    (row,) = run_tasks(tiny("llama"), None, [f"lambada={path}"], calibration=Tokens.of(ids, "mine.txt"))
    assert row.notes == (note,)


def test_mistakes_are_found_before_a_model_is_loaded(tiny, specs, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "loaded", None)
    for wrong, said in [
        ([*specs, specs[0]], "given twice"),
        ([], "no task is given"),
        ([*specs, f"arc_easy={tmp_path / 'none.jsonl'}"], "there is no file"),
    ]:
        with pytest.raises(DataError, match=said):
            run_tasks(tiny("llama"), None, wrong)


def test_a_model_that_cannot_be_loaded(tiny, specs, tmp_path):
    with pytest.raises(PlanError, match="unknown dtype"), loaded(tiny("llama"), dtype="int3"):
        pass
    with pytest.raises(SourceError):
        run_tasks(tmp_path / "nothing", None, specs)


def test_tokens_beyond_the_embedding_are_found_before_a_model_is_loaded(tiny, jsonl, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(other)
    shapes = {
        "c": {"context": "a <|new|> b", "choices": ["c", "d"], "label": 0},
        "g": {"prompt": "a <|new|> b", "answer": "c", "pattern": ".*"},
    }
    specs = [f"{name}={jsonl(f'{name}.jsonl', row)}" for name, row in shapes.items()]
    with loaded(other) as model:
        # Prompts that no file has, as those of the harness.
        with pytest.raises(DataError, match=r"'<\|new\|>'"):
            log_likelihoods(model, [("a <|new|> b", "c")])
        with pytest.raises(DataError, match=r"'<\|new\|>'"):
            greedy(model, ["a <|new|> b"], tokens=2)
    monkeypatch.setattr(run, "loaded", None)
    for spec in specs:
        with pytest.raises(DataError, match=r"'<\|new\|>' with the id 512"):
            run_tasks(other, None, [spec])
