"""What another engine gets of a native folder is what a folder of the decoded model holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lilliput
from lilliput.engines.decoded import weights
from lilliput.source.open import open_source

TABLES = {"method": "rtn", "target": {"bits": 6}, "where": {"include": ["embed", "lm_head"]}}


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "gpt2"])
def test_tensors_are_those_of_the_decoded_model(tiny: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    steps = [{"method": "rtn", "target": {"bits": 3, "symmetric": False}}, TABLES]
    recipe = lilliput.Recipe.model_validate({"steps": steps, "export": "lilliput"})
    out = tmp_path / "out"
    lilliput.compress(tiny(name), out, recipe=recipe, samples=2, tokens=16, eval_windows=0)
    made = dict(weights(open_source(str(out)), torch.float32))
    assert all(x.is_contiguous() for x in made.values())
    state: dict[str, Any] = {}
    plain = AutoModelForCausalLM.from_pretrained(tiny(name))
    plain.save_pretrained(tmp_path / "plain")
    for stored in open_source(str(tmp_path / "plain")).stored.values():
        assert made[stored.name].shape == stored.shape
        state[stored.name] = made.pop(stored.name)
    assert set(made) <= {"lm_head.weight"}  # beside the tied one
    opened = AutoModelForCausalLM.from_pretrained(out).eval()
    read = type(plain).from_pretrained(None, config=plain.config, state_dict=state).eval()
    ids = torch.arange(24).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(opened(ids).logits, read(ids).logits, atol=1e-5)


def test_a_tied_table_comes_once_and_an_untied_one_for_each(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = lilliput.Recipe.model_validate({"steps": [TABLES], "export": "lilliput"})
    out = tmp_path / "out"
    lilliput.compress(tiny("llama"), out, recipe=recipe, samples=2, tokens=16, eval_windows=0)
    source = open_source(str(out))
    assert "lm_head.weight" not in dict(weights(source, torch.float32))
    source.text_config.tie_word_embeddings = False
    made = dict(weights(source, torch.bfloat16))
    assert made["lm_head.weight"] is made["model.embed_tokens.weight"]
    assert made["lm_head.weight"].dtype == torch.bfloat16
