import re

import pytest

from lilliput.errors import DataError
from lilliput.tasks import files
from lilliput.tasks.files import Spec, load_task, parse
from lilliput.tasks.shapes import KINDS, table

PIQA = {"goal": "How to open a jar?", "sol1": "Twist the lid.", "sol2": "Sing to it.", "label": 0}
ARC = {"question": "What is warm?", "choices": ["ice", "fire", "snow"], "label": 1}
SHAG = {
    "activity_label": "Baking", "ctx_a": "A man stands. [header] He waits.", "ctx_b": "he",
    "endings": ["eats  it [step] now.", "flies."], "label": "1",
}  # fmt: skip
GRANDE = {"sentence": "Ann thanked Eve as _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"}
BOOLQ = {"question": "is ice cold", "passage": "Ice is cold.", "answer": True}
COPA = {
    "premise": "It rained.",
    "question": "effect",
    "choice1": "He sang.",
    "choice2": "The road got wet.",
    "label": 1,
}
SCIQ = {
    "question": "Who?",
    "distractor1": "a",
    "distractor2": "b",
    "distractor3": "c",
    "correct_answer": "d",
    "support": " S",
}
GSM = {"question": "1+1?", "answer": "It is 2.\n#### 2"}
CSQA = {"question": "Where? ", "choices": ["bank", "mall"], "labels": ["A", "B"], "label": 1}
SIQA = {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"}


def one(jsonl, name, row, **options):
    return load_task(parse(f"{name}={jsonl(f'{name}.jsonl', row)}"), **options).items[0]


@pytest.mark.parametrize(
    ("name", "row", "context", "continuations", "label"),
    [
        ("piqa", PIQA, "Question: How to open a jar?\nAnswer:", (" Twist the lid.", " Sing to it."), 0),
        ("arc_easy", ARC, "Question: What is warm?\nAnswer:", (" ice", " fire", " snow"), 1),
        ("openbookqa", ARC, "What is warm?", (" ice", " fire", " snow"), 1),
        ("hellaswag", SHAG, "Baking: A man stands. He waits. He", (" eats it now.", " flies."), 1),
        ("boolq", BOOLQ, "Ice is cold.\nQuestion: is ice cold?\nAnswer:", (" no", " yes"), 1),
        ("copa", COPA, "It rained therefore", ("  he sang.", "  the road got wet."), 1),
        ("sciq", SCIQ, "S\nQuestion: Who?\nAnswer:", (" a", " b", " c", " d"), 3),
        ("commonsenseqa", CSQA, "Question: Where?\nA. bank\nB. mall\nAnswer:", (" A", " B"), 1),
        ("social_iqa", SIQA, "Q: C. Q?\nA:", (" x", " y", " z"), 2),
        ("my", {"context": "Sky is", "choices": ["blue", "red"], "label": 0}, "Sky is", (" blue", " red"), 0),
        ("my", {"context": "Say:\n", "choices": ["a", "b"], "label": 0}, "Say:\n", ("a", "b"), 0),
    ],
)  # fmt: skip
def test_prompts_of_multiple_choice(jsonl, name, row, context, continuations, label):
    item = one(jsonl, name, row)
    assert item.contexts == (context,) * len(continuations)
    assert item.continuations == continuations
    assert item.label == label


def test_winogrande_scores_what_follows_the_option(jsonl):
    item = one(jsonl, "winogrande", GRANDE)
    assert item.contexts == ("Ann thanked Eve as Ann", "Ann thanked Eve as Eve")
    assert item.continuations == (" had helped.", " had helped.")
    assert item.label == 1


def test_lambada_in_both_layouts(jsonl):
    first = one(jsonl, "lambada", {"context": 'He said:\n"I', "target": "know"})
    second = one(jsonl, "lambada", {"text": 'He said:\n"I know'})
    assert first == second
    assert (first.context, first.target) == ('He said:\n"I', " know")


def test_generation_shows_worked_examples(jsonl):
    train = jsonl("train.jsonl", GSM, {"question": "2+2?", "answer": "Four.\n#### 4"}, GSM)
    test = jsonl("test.jsonl", {"question": "3+3?", "answer": "So\n#### 6"})
    task = load_task(parse(f"gsm8k={test}+{train}"), shots=2)
    assert task.items[0].prompt == (
        "Question: 1+1?\nAnswer: It is 2.\n#### 2\n\nQuestion: 2+2?\nAnswer: Four.\n#### 4\n\nQuestion: 3+3?\nAnswer:"
    )
    assert task.items[0].answer == "6"


def test_examples_from_the_file_itself_are_not_scored(jsonl):
    rows = [{"input": f"in {i}", "target": f"out {i}"} for i in range(6)]
    task = load_task(parse(f"bbh:mine={jsonl('b.jsonl', *rows)}"), limit=2)
    assert (task.name, task.shots) == ("bbh:mine", 3)
    assert [x.answer for x in task.items] == ["out 3", "out 4"]
    assert task.items[1].prompt == ("Q: in 0\nA: out 0\n\nQ: in 1\nA: out 1\n\nQ: in 2\nA: out 2\n\nQ: in 4\nA:")
    with pytest.raises(DataError, match="too few rows for 6 worked examples"):
        load_task(parse(f"bbh={jsonl('b.jsonl', *rows)}"), shots=6)


def test_shots_of_multiple_choice_show_the_right_answer(jsonl):
    path = jsonl("p.jsonl", GRANDE, {**GRANDE, "sentence": "Bo met Al; _ left."})
    item = load_task(parse(f"winogrande={path}"), shots=1).items[0]
    assert item.contexts[0] == "Ann thanked Eve as Eve had helped.\n\nBo met Al; Ann"


def test_specifications(tmp_path):
    assert parse("piqa=a.jsonl") == Spec("piqa", "piqa", tmp_path.__class__("a.jsonl"))
    assert parse("bbh:navigate=a.jsonl").entry == "bbh"
    assert parse("piqa") == Spec("piqa", "piqa", None)
    assert str(parse("gsm8k=a.jsonl+b.jsonl").examples) == "b.jsonl"
    (tmp_path / "mine.yaml").write_text("task: mine")
    found = parse(f"mine={tmp_path / 'mine.yaml'}")
    assert (found.file, found.definition) == (None, tmp_path / "mine.yaml")
    with pytest.raises(DataError, match=r"no file 'absent\.yaml' to describe the task 'mine'"):
        parse("mine=absent.yaml")
    odd = tmp_path / "c++.jsonl"
    odd.touch()
    assert parse(f"my={odd}").file == odd
    for bad in ("", "=a.jsonl", "piqa="):
        with pytest.raises(DataError, match="is not a task"):
            parse(bad)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("piqa", {k: v for k, v in PIQA.items() if k != "sol2"}, "row 2 of .*: there is no field 'sol2', only 'goal'"),
        ("piqa", {**PIQA, "label": 2}, "row 2 .* 'label' is 2, which is none of the 2 choices"),
        ("piqa", {**PIQA, "label": "x"}, "row 2 .* 'label' must be a whole number, not 'x'"),
        ("piqa", {**PIQA, "goal": 3}, "row 2 .* 'goal' must be text, not 3"),
        ("piqa", {**PIQA, "sol1": " "}, "row 2 .* an empty one, from the fields .*'sol1'"),
        ("piqa", "{broken", "row 2 .* is not JSON"),
        ("piqa", "[1]", "row 2 .* a row is an object with fields, not list"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_with_its_field(jsonl, name, row, said):
    with pytest.raises(DataError, match=said):
        load_task(parse(f"{name}={jsonl('f.jsonl', PIQA, row)}"))


def test_other_bad_rows(jsonl):
    for name, row, said in [
        ("winogrande", {**GRANDE, "answer": "3"}, "'answer' is '3'"),
        ("winogrande", {**GRANDE, "sentence": "No gap."}, "an empty one"),
        ("boolq", {**BOOLQ, "answer": "yes"}, "'answer' must be true or false"),
        ("lambada", {"context": "a", "target": ""}, "'target' leaves no target"),
        ("gsm8k", {"question": "a", "answer": "#### "}, "'answer' gives no answer"),
        ("my", {"prompt": "a", "answer": "b", "pattern": "("}, "'pattern' is not a regular expression"),
        ("my", {"prompt": "a"}, "there is no field 'answer'.*choice .context, choices, label"),
    ]:
        with pytest.raises(DataError, match=f"row 1 .*{said}"):
            load_task(parse(f"{name}={jsonl('f.jsonl', row)}"), shots=0)


def test_bad_files(jsonl, tmp_path):
    with pytest.raises(DataError, match="no file"):
        load_task(parse(f"piqa={tmp_path / 'none.jsonl'}"))
    with pytest.raises(DataError, match="no rows"):
        load_task(parse(f"piqa={jsonl('empty.jsonl')}"))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"goal": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"row 1 .* not UTF-8"):
        load_task(parse(f"piqa={latin}"))
    with pytest.raises(DataError, match="names no file"):
        load_task(parse("piqa"))


def test_every_shape_of_the_table_is_whole():
    for name, shapes in table().items():
        for shape in shapes:
            assert shape.kind in KINDS, name
            assert set(KINDS) == set(files.KINDS)
            used = " ".join((shape.context, shape.contexts, shape.choices, shape.target, shape.prompt, shape.shown))
            unused = [
                x
                for x in shape.fields
                if not re.search(rf"\b{x}\b", f"{used} {shape.answer} {shape.label} {shape.pattern}")
            ]
            assert unused == [], name
            if shape.patterns:
                assert shape.metric in shape.patterns, name


def test_fingerprint_tells_items_and_examples_apart(jsonl):
    path = jsonl("p.jsonl", PIQA, {**PIQA, "label": 1}, PIQA)
    spec = parse(f"piqa={path}")
    prints = {load_task(spec, limit=a, shots=b).fingerprint for a, b in [(1, 0), (2, 0), (1, 1)]}
    assert len(prints) == 3
    assert load_task(spec, limit=1).fingerprint in prints
