"""A smaller tokenizer cuts the text that it was made for as before, and loses nothing of any other."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lilliput.errors import PlanError
from lilliput.source import open_source
from lilliput.source.vocabulary import BytePairs, byte_pairs, rewritten

Tiny = Callable[[str], Path]
TEXT = "The library has lists, and dictionaries of lists: def f(x): return x + 10 — naïve café.\n<|endoftext|>Next.\n"


@pytest.fixture(scope="module")
def files(tiny: Tiny) -> dict[str, Path]:
    return open_source(str(tiny("llama"))).side_files()


def changed(files: dict[str, Path], folder: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Path]:
    """The files with another tokenizer.json."""
    whole = json.loads(files["tokenizer.json"].read_text())
    change(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return {**files, "tokenizer.json": folder / "tokenizer.json"}


def merged(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """BPE written out: the earliest merge of the list that applies anywhere is carried out, at its leftmost place."""
    parts = list(word)
    while True:
        for a, b in merges:
            places = [i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == (a, b)]
            if places:
                parts[places[0] : places[0] + 2] = [a + b]
                break
        else:
            return parts


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    draws=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=14),
    words=st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=4),
)
def test_kept_merges_give_the_same_tokens(
    files: dict[str, Path], draws: list[tuple[int, int]], words: list[str]
) -> None:
    """Of any list of merges, whatever the order in which it makes and uses its parts."""
    tokens, merges = ["a", "b", "c"], dict[tuple[str, str], int]()
    for x, y in draws:
        pair = tokens[x % len(tokens)], tokens[y % len(tokens)]
        merges.setdefault(pair, len(merges))
        tokens = list(dict.fromkeys((*tokens, "".join(pair))))
    known = byte_pairs(files, "tiny")
    numbers = {**known.tokens, **{x: 1000 + n for n, x in enumerate(tokens) if x not in known.tokens}}
    pairs = BytePairs(known.whole, numbers, merges, known.added)
    order = list(merges)
    used = [x for word in words for x in merged(word, order)]
    kept = pairs.needed(numbers[x] for x in used)
    assert {numbers[x] for x in used} <= kept
    fewer = [(a, b) for a, b in order if {numbers[a], numbers[b], numbers[a + b]} <= kept]
    assert [x for word in words for x in merged(word, fewer)] == used
    more = pairs.filled(kept, len(kept) + 3)
    fewer = [(a, b) for a, b in order if {numbers[a], numbers[b], numbers[a + b]} <= more]
    assert [x for word in words for x in merged(word, fewer)] == used


def smaller(files: dict[str, Path], text: str) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """The tokenizer, the one with what `text` needs, and the ids that stay."""
    whole = Tokenizer.from_file(str(files["tokenizer.json"]))
    kept = sorted(byte_pairs(files, "tiny").needed(whole.encode(text).ids))
    told = rewritten(files, kept, 512, "tiny")["tokenizer.json"]
    assert told is not None
    return whole, Tokenizer.from_str(told), kept


def test_the_text_is_cut_into_the_same_strings(files: dict[str, Path]) -> None:
    whole, fewer, kept = smaller(files, TEXT)
    assert fewer.get_vocab_size() == len(kept) < 512
    assert fewer.encode(TEXT).tokens == whole.encode(TEXT).tokens
    assert [kept[x] for x in fewer.encode(TEXT).ids] == whole.encode(TEXT).ids


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_is_read_back(files: dict[str, Path], text: str) -> None:
    fewer = smaller(files, "a list")[1]
    assert fewer.decode(fewer.encode(text).ids, skip_special_tokens=False) == text


def test_everything_that_names_an_id_is_numbered_anew(files: dict[str, Path], tmp_path: Path) -> None:
    number = json.loads(files["tokenizer.json"].read_text())["model"]["vocab"]["e"]

    def add(whole: dict[str, Any]) -> None:
        special = {"e": {"id": "e", "ids": [number], "tokens": ["e"]}}
        pieces = [{"SpecialToken": {"id": "e", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}
        whole["post_processor"] = {"type": "Sequence", "processors": [template]}
        whole["model"]["merges"] = [" ".join(x) for x in whole["model"]["merges"]]

    files = changed(files, tmp_path, add)
    for name, entries in {
        "tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<|endoftext|>"}}},
        "generation_config.json": {"eos_token_id": [0, number], "suppress_tokens": [number, 511], "top_k": 5},
        "vocab.json": {},
        "merges.txt": {},
        "tokenizer.model": {},
    }.items():
        (tmp_path / name).write_text(json.dumps(entries))
        files[name] = tmp_path / name
    pairs = byte_pairs(files, "tiny")
    kept = sorted(pairs.needed(Tokenizer.from_file(str(files["tokenizer.json"])).encode(TEXT).ids))
    assert 511 not in kept
    texts = rewritten(files, kept, 512, "tiny")
    whole = json.loads(texts["tokenizer.json"] or "")
    fewer = Tokenizer.from_str(texts["tokenizer.json"] or "")
    place = kept.index(number)
    assert fewer.encode("x").ids[0] == fewer.token_to_id("e") == place
    assert all(isinstance(x, str) for x in whole["model"]["merges"])
    assert json.loads(texts["generation_config.json"] or "") == {
        "eos_token_id": [0, place], "suppress_tokens": [place], "top_k": 5,
    }  # fmt: skip
    assert list(json.loads(texts["tokenizer_config.json"] or "")["added_tokens_decoder"]) == ["0"]
    assert json.loads(texts["vocab.json"] or "") == whole["model"]["vocab"]
    assert (texts["merges.txt"] or "").splitlines()[1:] == whole["model"]["merges"]
    assert texts["tokenizer.model"] is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x["model"].update(type="Unigram"), "its model is Unigram"),
        (lambda x: x["model"].update(byte_fallback=True), "falls back to bytes"),
        (lambda x: x["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda x: x.update(pre_tokenizer=None), "bytes are not what it cuts"),
        (lambda x: x["model"]["vocab"].pop("!"), "no token for 1 of the bytes"),
        (
            lambda x: (x["model"]["vocab"].pop("ñ"), x["model"].update(ignore_merges=True)),
            "no token for 1 of the bytes",
        ),
        (lambda x: x.update(post_processor={"type": "Odd"}), "Odd follows it"),
    ],
)
def test_other_tokenizers_are_refused(
    files: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], Any], why: str
) -> None:
    with pytest.raises(PlanError, match=f"tiny is no BPE over bytes .*{why}"):
        byte_pairs(changed(files, tmp_path, change), "tiny")


def test_bytes_that_have_no_token_are_lost_as_before(files: dict[str, Path], tmp_path: Path) -> None:
    def drop(whole: dict[str, Any]) -> None:
        gone = whole["model"]["vocab"]
        words = [x for x in gone if "ñ" in x]
        whole["model"]["vocab"] = {x: n for x, n in gone.items() if x not in words}
        whole["model"]["merges"] = [x for x in whole["model"]["merges"] if "ñ" not in "".join(x)]

    whole, fewer, _ = smaller(changed(files, tmp_path, drop), "a list")
    odd = "a\U00040000b"  # its first byte is 0xF1
    assert fewer.decode(fewer.encode(odd).ids) == whole.decode(whole.encode(odd).ids) != odd


def test_a_model_without_the_file_is_refused(files: dict[str, Path]) -> None:
    rest = copy.copy(files)
    del rest["tokenizer.json"]
    with pytest.raises(PlanError, match=r"tiny has no tokenizer\.json"):
        byte_pairs(rest, "tiny")
