import pytest

from lilliput.tasks import generate
from lilliput.tasks.generate import Generate, extract, normal
from lilliput.tasks.shapes import table


def graded(monkeypatch, name, answers):
    shape = table()[name][0]
    items = [Generate("p", right, "w", pattern) for _, right, pattern in answers]
    monkeypatch.setattr(generate, "greedy", lambda loaded, prompts, **options: [x for x, _, _ in answers])
    return generate.measure(None, shape, items, lambda done, total: None)


def test_gsm8k_strictly_and_flexibly(monkeypatch):
    answers = [
        (" So 3 * 6 = 18.\n#### 18", "18", ""),
        (" The answer is $1,200.", "1200", ""),
        (" #### 17 or 18", "18", ""),
        (" I do not know", "18", ""),
    ]
    found = graded(monkeypatch, "gsm8k", answers)
    assert found == {"strict_match": [1.0, 0.0, 0.0, 0.0], "flexible_extract": [1.0, 1.0, 1.0, 0.0]}


def test_yes_and_no_of_strategyqa(monkeypatch):
    answers = [(" Facts. So the answer is Yes.", "yes", ""), (" So the answer is no.", "yes", ""), (" yes", "yes", "")]
    assert graded(monkeypatch, "strategyqa", answers) == {"exact_match": [1.0, 0.0, 0.0]}


def test_whole_answers_and_patterns_of_items(monkeypatch):
    assert graded(monkeypatch, "bbh", [(" (B)", "(B)", ""), (" (B) it is", "(B)", "")])["exact_match"] == [1.0, 0.0]
    own = graded(
        monkeypatch, "generate", [("It is blue, I think", "blue", r"It is (\w+)"), ("?", "blue", r"It is (\w+)")]
    )
    assert own["exact_match"] == [1.0, 0.0]


def test_extraction():
    assert extract("a1 b2", r"\w(\d)") == "1"
    assert extract("a1 b2", r"\w(\d)", "last") == "2"
    assert extract("a1 b2", r"[a-z]\d") == "a1"
    assert extract("b2", r"(a\d)|(b\d)") == "b2"
    assert extract("x", r"\d") is None


@pytest.mark.parametrize(("answer", "expected"), [(" Yes.", "yes"), ("$1,200", "1200"), ("(B)", "(b)"), ("3.5", "3.5")])
def test_what_does_not_count_is_left_out(answer, expected):
    assert normal(answer) == expected
