"""Text to train on: which tokens count, documents that share rows, texts that are mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from lilliput.data import lessons
from lilliput.data.documents import Document, answered, pack, shares
from lilliput.data.lessons import Lessons
from lilliput.data.tokens import Tokens
from lilliput.errors import DataError

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Earlier answers lose what they say before a bar once another turn follows.
FORGETFUL = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('|')[-1] }}")
# The whole chat is told how long it is.
COUNTED = "{{ messages | length }} turns\n" + CHAT
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Seven, I say."},
]


@pytest.fixture
def chatty(tokenizer: tf.PreTrainedTokenizerFast) -> Any:
    """The tokenizer with a template, for one test."""
    tokenizer.chat_template = CHAT
    yield tokenizer
    tokenizer.chat_template = None


def counted(document: Document, tokenizer: Any) -> str:
    text: str = tokenizer.decode([x for x, counts in zip(document.ids, document.counts, strict=True) if counts])
    return text


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_count_and_nothing_else(chatty: Any) -> None:
    document = answered(TURNS, chatty, "row 1")
    assert counted(document, chatty) == "Four.</s>\nSeven, I say.</s>\n"
    assert chatty.decode(document.ids) == chatty.apply_chat_template(TURNS, tokenize=False)


def test_templates_that_do_not_show_where_answers_are(chatty: Any) -> None:
    chatty.chat_template = FORGETFUL
    assert counted(answered(TURNS, chatty, "row 1"), chatty) == "Four.</s>\nSeven, I say.</s>\n"
    chatty.chat_template = COUNTED
    with pytest.raises(DataError, match=r"^row 1: the chat template writes what comes before turn 3 otherwise"):
        answered(TURNS, chatty, "row 1")
    chatty.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        answered(TURNS, chatty, "row 1")


def test_chats_and_instructions_become_rows_of_documents(chatty: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "chat.jsonl",
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"messages": TURNS[:2]},  # no answer: nothing to learn
    )
    found = lessons.read(path, chatty, samples=8, tokens=160)
    assert len(found) == 1
    assert chatty.decode(found.ids[0][found.counts[0]]) == "Four.</s>\nSeven, I say.</s>\nGood day</s>\n3</s>\n"
    assert found.positions is not None
    assert int((found.positions[0] == 0).sum()) == 4  # three documents, and what is left
    assert not bool(found.counts[found.positions == 0].any())


def test_rows_of_text_are_one_text_or_documents(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl", *({"text": f"The number {n} and some more of it. " * 2} for n in range(20)))
    running = lessons.read(path, tokenizer, samples=4, tokens=32)
    assert running.positions is None
    assert running.ids.shape == (4, 32)
    assert bool(running.counts[:, 1:].all())
    assert not bool(running.counts[:, 0].any())
    apart = lessons.read(path, tokenizer, samples=400, tokens=64, apart=True)
    assert apart.positions is not None
    assert int((apart.ids == tokenizer.eos_token_id).sum()) >= 20
    assert running.fingerprint != apart.fingerprint


def test_fewer_samples_where_the_text_ends(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("A day like any other. " * 40)
    found = lessons.read(str(path), tokenizer, samples=1000, tokens=16)
    assert 5 < len(found) < 100
    with pytest.raises(DataError, match="fewer than one sample of 4096"):
        lessons.read(str(path), tokenizer, samples=2, tokens=4096)


def test_packing_wastes_little_and_loses_nothing() -> None:
    documents = [Document([n] * size, [True] * size) for n, size in enumerate((9, 4, 3, 7, 25, 1, 6))]
    packed = pack(documents, rows=10, tokens=10, filler=99)
    sizes = {n: int((packed.ids == n).sum()) for n in range(7)}
    assert sizes == {0: 9, 1: 4, 2: 3, 3: 7, 4: 25, 5: 0, 6: 6}
    assert len(packed.ids) == 7
    assert not bool(packed.counts[packed.positions == 0].any())
    assert int(packed.counts.sum()) == sum(sizes.values()) - 8  # every piece but its first token
    assert len(pack(documents, rows=2, tokens=10, filler=99).ids) == 2


def test_texts_are_mixed_by_weight(tokenizer: Any, tmp_path: Path) -> None:
    names = {}
    for name, text in (("a", "All is well. "), ("b", "Nothing is. ")):
        (tmp_path / f"{name}.txt").write_text(text * 200)
        names[name] = str(tmp_path / f"{name}.txt")
    found = lessons.read({names["a"]: 3.0, names["b"]: 1.0}, tokenizer, samples=8, tokens=16)
    assert found.domains == (names["a"], names["b"])
    assert found.domain is not None
    assert found.domain.bincount().tolist() == [6, 2]
    again = Lessons.taken_up(found.tensors(), found.source, found.domains)
    assert again.fingerprint == found.fingerprint
    assert shares({"x": 1.0, "y": 1.0, "z": 1.0}, 4) == {"x": 2, "y": 1, "z": 1}
    for bad in ({}, {"x": -1.0, "y": 3.0}, {"x": 0.0}):
        with pytest.raises(DataError, match="weights"):
            shares(bad, 4)


def test_text_of_the_models_own(tokenizer: Any) -> None:
    own = Tokens.of(torch.arange(12).view(2, 6), "self")
    assert torch.equal(lessons.read("self", tokenizer, samples=2, tokens=6, own=lambda n: own).ids, own.ids)
    with pytest.raises(DataError, match="none is at hand"):
        lessons.read("self", tokenizer, samples=2, tokens=6)
