"""A continuation is what transformers generates from the same folder, and mistakes have one message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilliput import api
from lilliput.errors import DataError, SourceError
from lilliput.machine.device import compute_dtype
from lilliput.progress import Quiet

Tiny = Callable[[str], Path]
PROMPT = "The statement of a class"
NEW = 12


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("qwen2"), tmp_path / "model"))


def theirs(folder: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype("auto", "cpu")).eval()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    more = {"tokenizer": tokenizer} if model.generation_config.stop_strings else {}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **more
    )
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def text(folder: Path, ids: list[int]) -> str:
    return str(AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)).strip()


def settings(folder: Path, **fields: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


def test_stops_and_constraints_are_those_of_the_folder(copy: Path) -> None:
    settings(copy, eos_token_id=0)
    free = theirs(copy)
    assert len(free) == NEW
    pieces = [AutoTokenizer.from_pretrained(copy).decode([x]) for x in free[1:-2]]
    plain = next(x for x in pieces if x.isascii() and x.strip())
    cases: list[dict[str, Any]] = [
        {"eos_token_id": [0, free[3]]},
        {"eos_token_id": 0, "suppress_tokens": [free[0]]},
        {"eos_token_id": 0, "begin_suppress_tokens": [free[0]]},
        {"eos_token_id": 0, "bad_words_ids": [[free[1]]]},
        {"eos_token_id": 0, "repetition_penalty": 5.0},
        {"eos_token_id": 0, "no_repeat_ngram_size": 1},
        {"eos_token_id": 0, "forced_eos_token_id": 0},
        {"eos_token_id": [0, free[3]], "min_new_tokens": 8},
        {"eos_token_id": 0, "stop_strings": [plain]},
    ]
    seen = set()
    for case in cases:
        # What only sampling and beams read must not change anything.
        settings(copy, **case, do_sample=True, temperature=0.6, top_p=0.9, num_return_sequences=1)
        wanted = theirs(copy)
        assert wanted != free or "begin_suppress_tokens" in case, case
        assert api.generate(copy, PROMPT, max_new_tokens=NEW) == text(copy, wanted), case
        seen.add(tuple(wanted))
    assert len(seen) > 4


def test_beams_and_settings_that_greedy_decoding_has_no_use_of(copy: Path) -> None:
    settings(copy, eos_token_id=0)
    free = text(copy, theirs(copy))
    settings(
        copy, eos_token_id=0, num_beams=3, early_stopping=True, length_penalty=2.0, return_dict_in_generate=True,
        max_length=4,
    )  # fmt: skip
    assert api.generate(copy, PROMPT, max_new_tokens=NEW) == free


def test_a_settings_file_that_cannot_be_read(copy: Path) -> None:
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"generation_config\.json"):
        api.generate(copy, PROMPT)


def test_a_native_folder_continues(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.compress(
        tiny("llama"), out, recipe="hqq", samples=2, tokens=16, eval_windows=0, progress=Quiet(), device="cpu",
        dtype="float32",
    )  # fmt: skip
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "lilliput"
    assert isinstance(api.generate(out, PROMPT, max_new_tokens=4), str)


def test_positions_are_counted_before_anything_is_loaded(tiny: Tiny) -> None:
    with pytest.raises(DataError, match=r"256 positions: ask for at most"):
        api.generate(tiny("gpt2"), PROMPT, max_new_tokens=256)
    with pytest.raises(DataError, match="shorten the prompt"):
        api.generate(tiny("gpt2"), "word " * 300, max_new_tokens=1)
    with pytest.raises(DataError, match="Unicode"):
        api.generate(tiny("gpt2"), "half \ud83d")


def test_a_prompt_with_a_token_beyond_the_embedding(copy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(DataError, match=r"the prompt contains the token '<\|new\|>'"):
        api.generate(copy, "a <|new|> b")


def test_a_template_that_fails(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] + 1 }}")
    with pytest.raises(DataError, match=r"the prompt: .*refuses this chat"):
        api.generate(copy, PROMPT)
