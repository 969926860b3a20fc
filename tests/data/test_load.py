import hashlib
import json
import logging
import random
import sys
import types
from itertools import islice

import pytest
import torch
from tokenizers import processors

from lilliput.data import docs, load_tokens
from lilliput.data.hub import dataset
from lilliput.data.load import check
from lilliput.data.tokens import Tokens, encode
from lilliput.errors import DataError


def prose(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    vocabulary = ["statement", "the", "of", "class", "\n", "value", "is", "object;", "Zürich", "0x1f", "   ", "\n\n"]
    return " ".join(rng.choice(vocabulary) for _ in range(words))


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_windows_are_the_consecutive_start_of_the_whole_text(tokenizer, tmp_path):
    text = prose(30_000)
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    got = load_tokens(path, tokenizer, samples=5, tokens=40)
    assert got.ids.dtype == torch.int64
    assert got.ids.shape == (5, 40)
    assert got.ids.flatten().tolist() == whole(tokenizer, text)[:200]
    assert got.source == str(path)


def test_only_the_needed_part_of_a_large_file_is_read(tokenizer, tmp_path):
    path = tmp_path / "large.txt"
    # Everything past the first megabyte is not even UTF-8: reading it would fail.
    path.write_bytes(prose(200_000).encode()[: 1 << 20] + b"\n" + b"\xff" * (1 << 20))
    assert load_tokens(path, tokenizer, samples=8, tokens=128).ids.shape == (8, 128)
    with pytest.raises(DataError, match="not UTF-8"):
        load_tokens(path, tokenizer, samples=8, tokens=128, seed=0)


def test_a_prefix_ends_where_the_whole_text_would_cut(tokenizer, tmp_path):
    # One token per character at worst: the first guess at the length is too short or too long, the result the same.
    for text in ("\x01" * 5_000, "a" * 9_000, "statement " * 3_000):
        path = tmp_path / "odd.txt"
        path.write_text(text, encoding="utf-8")
        ids = whole(tokenizer, text)
        n = len(ids) // 2
        assert load_tokens(path, tokenizer, samples=1, tokens=n).ids[0].tolist() == ids[:n]


def test_a_seed_draws_other_windows_of_the_same_grid(tokenizer, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(prose(8_000), encoding="utf-8")
    ids = whole(tokenizer, prose(8_000))
    grid = {tuple(ids[i : i + 32]): i // 32 for i in range(0, len(ids) - 31, 32)}
    first = load_tokens(path, tokenizer, samples=6, tokens=32, seed=1)
    places = [grid[tuple(row)] for row in first.ids.tolist()]
    assert places == sorted(set(places))
    assert torch.equal(first.ids, load_tokens(path, tokenizer, samples=6, tokens=32, seed=1).ids)
    assert not torch.equal(first.ids, load_tokens(path, tokenizer, samples=6, tokens=32, seed=2).ids)


def test_fingerprint_is_of_shape_and_ids():
    ids = torch.arange(12).view(3, 4)
    expected = hashlib.sha256(b"(3, 4)" + ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert Tokens.of(ids, "x").fingerprint == expected
    assert Tokens.of(ids.view(4, 3), "x").fingerprint != expected
    assert Tokens.of(ids.flip(0), "x").fingerprint != expected
    assert Tokens.of(ids.T, "x").fingerprint == Tokens.of(ids.T.contiguous(), "y").fingerprint


def test_no_warning_about_long_texts(tokenizer, tmp_path, caplog):
    path = tmp_path / "long.txt"
    path.write_text(prose(2_000), encoding="utf-8")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        load_tokens(path, tokenizer, samples=2, tokens=128)
        assert not caplog.records
        # The very text does warn when it is tokenized carelessly, so the silence above means something.
        tokenizer(path.read_text(encoding="utf-8"))
        assert any("longer than" in x.getMessage() for x in caplog.records)
    finally:
        logger.removeHandler(caplog.handler)


def test_start_token_once_where_the_tokenizer_adds_one(tokenizer):
    tokenizer.bos_token = "<|endoftext|>"
    start = tokenizer.bos_token_id
    plain = whole(tokenizer, "a statement")
    assert encode(tokenizer, "a statement") == plain
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[("<|endoftext|>", start), ("<|im_end|>", tokenizer.eos_token_id)],
    )
    assert encode(tokenizer, "a statement") == [start, *plain]
    assert encode(tokenizer, "<|endoftext|>a statement") == [start, *plain]


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    return path


def text_of(path, tokenizer, count):
    tokens = load_tokens(path, tokenizer, samples=1, tokens=count)
    return tokenizer.decode(tokens.ids[0], clean_up_tokenization_spaces=False)


def test_text_rows_are_parted_by_a_blank_line(tokenizer, tmp_path):
    path = write_rows(tmp_path / "t.jsonl", {"id": 1, "text": "one statement"}, {"text": ""}, {"text": "two"})
    expected = "one statement\n\ntwo"
    assert text_of(path, tokenizer, len(whole(tokenizer, expected))) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {"instruction": "hi", "input": "", "output": "yes"},
        {"instruction": "hi", "output": "yes"},
    ],
)
def test_chat_and_instruction_rows_go_through_the_chat_template(tokenizer, tmp_path, row):
    path = write_rows(tmp_path / "c.jsonl", row, row)
    once = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    count = len(whole(tokenizer, once + once))
    tokens = load_tokens(path, tokenizer, samples=1, tokens=count)
    assert tokens.ids[0].tolist() == whole(tokenizer, once + once)
    # The template's marks are the special tokens, not their spelling.
    assert int((tokens.ids == tokenizer.convert_tokens_to_ids("<|im_start|>")).sum()) == 4


def test_instruction_rows_without_a_template_are_plain_text(tokenizer, tmp_path):
    tokenizer.chat_template = None
    path = write_rows(tmp_path / "i.jsonl", {"instruction": "add", "input": "1 1", "output": "2"})
    assert text_of(path, tokenizer, len(whole(tokenizer, "add\n\n1 1\n\n2"))) == "add\n\n1 1\n\n2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": 3, "question": "x"}', r"row 2 .*'id', 'question'.*known are 'text'; 'messages' or 'conversations'"),
        ('{"text": 3}', r"row 2 .*must be text, not int"),
        ("[1]", r"row 2 .*not list"),
        ('{"text": "x"', r"row 2 .*is not JSON"),
        ('{"messages": []}', r"row 2 .*non-empty"),
        ('{"messages": ["x"]}', r"row 2 .*'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": [{"image": 1}]}]}', r"row 2 .*'role' and 'content'"),
        ('{"messages": [{"role": "judge", "content": "x"}]}', r"row 2 .*template refuses.*no such role"),
        ('{"instruction": "a", "output": 3}', r"row 2 .*must be text"),
    ],
)
def test_a_bad_row_is_named(tokenizer, tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + row + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_tokens(path, tokenizer, samples=1, tokens=64)


def test_chat_without_a_template_is_refused(tokenizer, tmp_path):
    tokenizer.chat_template = None
    path = write_rows(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(DataError, match=r"row 1 .*no chat template"):
        load_tokens(path, tokenizer, samples=1, tokens=4)


def test_too_little_text_says_how_much_there_is(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a statement", encoding="utf-8")
    count = len(whole(tokenizer, "a statement"))
    with pytest.raises(DataError, match=rf"holds {count} tokens, but 4 x 8 = 32 tokens"):
        load_tokens(path, tokenizer, samples=4, tokens=8)
    with pytest.raises(DataError, match=rf"holds {count} tokens"):
        load_tokens(path, tokenizer, samples=4, tokens=8, seed=3)
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no text"):
        load_tokens(path, tokenizer, samples=4, tokens=8)


def test_bad_files_and_names(tokenizer, tmp_path):
    def fails(source, message, samples=1):
        with pytest.raises(DataError, match=message):
            load_tokens(source, tokenizer, samples=samples, tokens=8)

    fails(tmp_path / "none.txt", "there is no file")
    fails(tmp_path / "none.jsonl", "there is no file")
    fails("dosc", "'dosc' is not a source of text: give docs")
    fails("self", "'self' is text that the model writes")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    fails(tmp_path / "x.parquet", r"\.txt and \.jsonl")
    (tmp_path / "folder.txt").mkdir()
    fails(tmp_path / "folder.txt", "cannot be read")
    (tmp_path / "latin.txt").write_bytes("gut\nschön\n".encode("latin-1"))
    fails(tmp_path / "latin.txt", "line 2 .*not UTF-8")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "schön"}\n'.encode("latin-1"))
    fails(tmp_path / "latin.jsonl", "line 2 .*not UTF-8")
    fails("docs", "at least 1", samples=0)


def test_byte_order_mark_is_no_text(tokenizer, tmp_path):
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfa statement of the value")
    assert text_of(path, tokenizer, 4) == tokenizer.decode(whole(tokenizer, "a statement of the value")[:4])


def test_docs_hold_enough_in_a_fixed_order():
    reference = list(docs.pieces("docs:reference"))
    library = list(islice(docs.pieces("docs:library"), 700))
    both = list(islice(docs.pieces("docs"), len(reference) + 700))
    assert sum(len(x.split()) for x in both) > 100_000
    assert len(" ".join(reference).split()) > 40_000
    assert both == [*reference, "\n\n" + library[0], *library[1:]]
    assert not {x.strip() for x in reference} & {x.strip() for x in library}


def test_docs_of_a_stripped_python(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(docs.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(DataError, match="has no text"):
        load_tokens("docs", tokenizer, samples=1, tokens=8)


def hub(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_names_its_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'lilliput\[hub\]'"):
        load_tokens("hub:wikitext", tokenizer, samples=1, tokens=8)


def test_hub_fields_reach_the_package(tokenizer, monkeypatch):
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return [{"body": "one statement of the value", "text": "never"}] * 3

    hub(monkeypatch, load)
    got = load_tokens("hub:org/set:en:validation:body", tokenizer, samples=2, tokens=4)
    text = "\n\n".join(["one statement of the value"] * 3)
    assert got.ids.flatten().tolist() == whole(tokenizer, text)[:8]
    load_tokens("hub:org/set", tokenizer, samples=2, tokens=1)
    assert asked == [("org/set", "en", "validation", True), ("org/set", None, "train", True)]
    with pytest.raises(DataError, match=r"row 1 .*no column 'boddy', only 'body', 'text'"):
        load_tokens("hub:org/set:::boddy", tokenizer, samples=2, tokens=4)
    for wrong in ("hub:", "hub:a:b:c:d:e"):
        with pytest.raises(DataError, match="is written hub:dataset"):
            load_tokens(wrong, tokenizer, samples=2, tokens=4)


def test_hub_out_of_reach(tokenizer, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    hub(monkeypatch, offline)
    with pytest.raises(DataError, match=r"cannot be opened \(ConnectionError: no network\).*'docs'"):
        load_tokens("hub:wikitext", tokenizer, samples=1, tokens=8)

    def breaks(*_, **__):
        yield {"text": "one"}
        raise TimeoutError("read timed out")

    hub(monkeypatch, breaks)
    with pytest.raises(DataError, match="broke off"):
        load_tokens("hub:wikitext", tokenizer, samples=1, tokens=8)


NAMED = [
    ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), "\n\n"),
    ("wikitext2:train", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"), "\n\n"),
    ("c4", ("allenai/c4", "en", "validation"), " "),
]


@pytest.mark.parametrize(("source", "asked", "joint"), NAMED)
def test_named_sets_are_joined_as_papers_do(tokenizer, monkeypatch, source, asked, joint):
    seen = []

    def load(name, config, *, split, streaming):
        seen.append((name, config, split))
        assert streaming
        return [{"text": x} for x in rows]

    rows = ["", " = The value = \n", "", "", "one statement of the value \n", "two"]
    hub(monkeypatch, load)
    ids = whole(tokenizer, joint.join(rows))
    got = load_tokens(source, tokenizer, samples=1, tokens=len(ids))
    assert got.ids[0].tolist() == ids
    assert seen == [asked]
    assert got.source == source


def test_named_sets_out_of_reach(tokenizer, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    hub(monkeypatch, offline)
    with pytest.raises(DataError, match=r"'c4' cannot be opened .*without a network use 'docs' or a local file"):
        load_tokens("c4", tokenizer, samples=1, tokens=8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"'wikitext2' needs .*pip install 'lilliput\[hub\]'"):
        load_tokens("wikitext2", tokenizer, samples=1, tokens=8)
    with pytest.raises(DataError, match=r"'ptb' is not a source of text: .*wikitext2, c4.*only as a script"):
        load_tokens("ptb", tokenizer, samples=1, tokens=8)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"text": "half \\ud83d of a pair"}', r"row 2 .*\\ud83d"),
        ("[" * 100_000 + "]" * 100_000, "row 2 .*nested"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "row 2 .*number"),
    ],
    ids=["surrogate", "deep", "digits"],
)
def test_rows_that_no_text_can_be_made_of(tokenizer, tmp_path, row, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "fine \U0001f600 " * 3}) + "\n" + row + "\n")  # a whole pair is a character
    with pytest.raises(DataError, match=said):
        load_tokens(path, tokenizer, samples=2, tokens=64)


def test_a_template_may_fail_in_any_way(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    for template in ("{{ messages[0]['content'] + 1 }}", "{{ 1 // 0 }}", "{{ messages[0].nothing.more }}"):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=r"row 1 .*refuses this chat: \S"):
            load_tokens(path, tokenizer, samples=1, tokens=2)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_without_text_says_so(tokenizer, tmp_path, suffix):
    starts = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = starts
    tokenizer.bos_token = "<|endoftext|>"
    assert encode(tokenizer, "a")[0] == 0
    path = tmp_path / f"empty{suffix}"
    path.write_text("")
    with pytest.raises(DataError, match="holds no text"):
        load_tokens(path, tokenizer, samples=1, tokens=4)


@pytest.mark.parametrize("seed", [None, 0])
def test_a_token_beyond_the_embedding_is_named(tokenizer, tmp_path, seed):
    size = len(tokenizer)
    tokenizer.add_tokens(["<|new|>"])
    path = tmp_path / "new.txt"
    text = "old words " * 20 + "<|new|>"
    path.write_text(text)
    room = {"samples": 1, "seed": seed, "tokens": len(whole(tokenizer, text))}
    with pytest.raises(DataError, match=rf"'<\|new\|>' with the id {size}, .*{size} rows"):
        load_tokens(path, tokenizer, vocabulary=size, **room)
    assert load_tokens(path, tokenizer, vocabulary=size + 1, **room).ids.max() == size
    # Windows before it can be read.
    assert load_tokens(path, tokenizer, samples=1, tokens=8, vocabulary=size).ids.shape == (1, 8)


def test_a_source_is_checked_by_its_name_alone(tmp_path):
    for name in ("docs", "docs:library", "wikitext2", "hub:some/set"):
        check(name)
    (tmp_path / "a.csv").write_text("a")
    wrong = (
        ("doc", "not a source"),
        (tmp_path / "no.txt", "no file"),
        (tmp_path / "a.csv", "rename"),
        ("self", "its own calibration"),
    )
    for name, said in wrong:
        with pytest.raises(DataError, match=said):
            check(name)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("wikitext2", "Salesforce/wikitext"),
        ("c4:train", "allenai/c4"),
        ("hub:org/texts:en:train", "org/texts"),
        ("docs", None),
        ("rows.jsonl", None),
    ],
)
def test_which_data_set_of_the_hub_a_source_names(source: str, found: str | None) -> None:
    assert dataset(source) == found
