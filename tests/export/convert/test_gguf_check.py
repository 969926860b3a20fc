"""llama.cpp's eye on a written file, with an engine that answers what the test says."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from lilliput import api
from lilliput.errors import LilliputError
from lilliput.export.convert import gguf_check, gguf_texts, llamacpp
from lilliput.model.stored import open_model

Tiny = Callable[[str], Path]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> Callable[..., None]:
    """Makes an engine that says what the folder `name` says, but for what is changed."""

    def say(name: str, change: Callable[[llamacpp.Answer], llamacpp.Answer] = lambda x: x) -> None:
        def ask(python: str, file: Path, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> llamacpp.Answer:
            tokenizer: Any = tf.AutoTokenizer.from_pretrained(tiny(name))
            model: Any = tf.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
            with torch.no_grad():
                logits = model(torch.tensor(rows)).logits
            alone = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in texts]
            return change(llamacpp.Answer("1.0", alone, [tokenizer(x)["input_ids"] for x in texts], logits))

        monkeypatch.setattr(llamacpp, "python", lambda: "python")
        monkeypatch.setattr(llamacpp, "ask", ask)

    return say


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "python", lambda: None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_file_that_is_right_is_written_and_the_report_says_how_near(
    name: str, tiny: Tiny, tmp_path: Path, answers: Callable[..., None]
) -> None:
    answers(name)
    done = api.convert(tiny(name), tmp_path / "m.gguf")
    assert done.out.exists()
    assert done.engine.startswith("llama.cpp (llama-cpp-python 1.0), logits to ")
    assert "strings are the same tokens" in done.notes[0]
    assert float(done.engine.rsplit(" ", 1)[1]) < 1e-5


def _other_tokens(x: llamacpp.Answer) -> llamacpp.Answer:
    tokens = [list(row) for row in x.tokens]
    tokens[2][0] += 1
    return llamacpp.Answer(x.version, tokens, x.prompts, x.logits)


def _other_logits(x: llamacpp.Answer) -> llamacpp.Answer:
    assert x.logits is not None
    return llamacpp.Answer(x.version, x.tokens, x.prompts, x.logits * 1.01)


@pytest.mark.parametrize(("change", "says"), [
    (_other_tokens, r"reads 1 of \d+ strings as other tokens, 'Hello' as"),
    (_other_logits, r"other logits than the weights.*0.01, 0.005 at most"),
    (lambda x: llamacpp.Answer(problem="llama.cpp stops: no such architecture"), "no such architecture"),
])  # fmt: skip
def test_a_file_that_is_wrong_is_not_written(
    change: Any, says: str, tiny: Tiny, tmp_path: Path, answers: Callable[..., None]
) -> None:
    answers("llama", change)
    with pytest.raises(LilliputError, match=says):
        api.convert(tiny("llama"), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_without_llama_cpp_the_report_says_so_and_how_to_install_it(tiny: Tiny, tmp_path: Path, absent: None) -> None:
    done = api.convert(tiny("llama"), tmp_path / "m.gguf")
    assert any("not checked in llama.cpp" in x and llamacpp.VARIABLE in x for x in done.notes)
    checks = api.verify(done.out)
    assert checks.whole
    assert any("not checked in llama.cpp" in x for x in checks.notes)


def test_verify_looks_at_a_file(tiny: Tiny, tmp_path: Path, answers: Callable[..., None]) -> None:
    answers("llama")
    out = api.convert(tiny("llama"), tmp_path / "m.gguf").out
    assert api.verify(out).whole
    answers("llama", _other_logits)
    assert any("other logits" in x for x in api.verify(out).problems)
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    assert not api.verify(out).whole


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_logits_are_those_of_transformers(name: str, tiny: Tiny) -> None:
    ids = torch.arange(3, 40)[None]
    model: Any = tf.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    with torch.no_grad():
        wanted = model(ids).logits[0]
    torch.testing.assert_close(gguf_check.logits(open_model(str(tiny(name))), ids), wanted, rtol=1e-5, atol=1e-5)


def test_the_distance_sees_what_changes_probabilities() -> None:
    ours = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert gguf_check.distance(ours + 3.0, ours) < 1e-6
    assert gguf_check.distance(ours * 1.1, ours) == pytest.approx(0.1, rel=1e-4)
    assert gguf_check.distance(ours[:, :-1], ours) == float("inf")
    assert gguf_check.distance(ours * float("nan"), ours) == float("inf")


def test_texts_are_many_and_different() -> None:
    texts = gguf_texts.texts(["<tool>"])
    assert len(set(texts)) == len(texts) >= gguf_texts.COUNT
    assert "<tool><tool>" in texts
    assert len(set(gguf_texts.texts(()))) >= gguf_texts.COUNT
    assert any(unicodedata.normalize("NFC", x) != x for x in texts)


def test_a_tokenizer_that_composes_letters(tiny: Tiny) -> None:
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(tiny("llama"))
    assert not gguf_check._composes(tokenizer)
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    assert gguf_check._composes(tokenizer)


def test_words_that_the_engine_knows_by_name_are_told_apart_from_other_readings() -> None:
    words = ["H", "i", "<", "/", "s", ">", "</s>", "Hi"]

    class Spelled:
        def __init__(self) -> None:
            self.added_tokens_decoder: dict[int, Any] = {}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [words.index(x) for x in text]}

        def convert_ids_to_tokens(self, token: int) -> str:
            return words[token]

    ours = Spelled()("Hi</s>")["input_ids"]
    assert gguf_check._marker(Spelled(), "Hi</s>", [0, 1, 6], ours) == "</s>"
    assert gguf_check._marker(Spelled(), "Hi</s>", [0, 6], ours) is None
    assert gguf_check._marker(Spelled(), "Hi</s>", [7, 2, 3, 4, 5], ours) is None
