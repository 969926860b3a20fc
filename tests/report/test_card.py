"""The model card: front matter that a hub reads, the figures, and the licence carried over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lilliput.export.card import Card, Figure, read_licence, render


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


def test_tells_model_licence_recipe_and_figures() -> None:
    card = Card(
        "t", "org/model-1.5", "compressed-tensors", "steps:\n- method: gptq\n",
        (Figure("perplexity", "20.5 [20.1, 20.9]", "19.9"), Figure("size", "100 MB")),
        {"license": "other", "license_link": "https://x.y"}, ("It runs dense on a CPU.",), ("org/texts",),
    )  # fmt: skip
    text = render(card)
    head = front(text)
    assert head["base_model"] == "org/model-1.5"
    assert (head["license"], head["license_link"]) == ("other", "https://x.y")
    assert head["base_model_relation"] == "quantized"
    assert (head["datasets"], head["tags"]) == (["org/texts"], ["lilliput", "compressed-tensors"])
    assert "| perplexity | 20.5 [20.1, 20.9] | 19.9 |" in text
    assert "| size | 100 MB | - |" in text
    assert "- method: gptq" in text
    assert "- It runs dense on a CPU." in text
    assert "import lilliput" not in text


@pytest.mark.parametrize("model", ["./here", "/models/a", "a/b/c", "model"])
def test_a_path_is_no_base_model_of_the_hub(model: str) -> None:
    text = render(Card("t", model, "dense", ""))
    assert "base_model" not in front(text)
    assert f"`{model}`" in text
    assert "gives no licence" in text


def test_native_folders_ask_for_the_import() -> None:
    assert "import lilliput" in render(Card("t", "m", "lilliput", ""))
    wrapper = render(Card("t", "m", "lilliput", "", opener="AutoModelForImageTextToText"))
    assert 'AutoModelForImageTextToText.from_pretrained("DIR")' in wrapper


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# M", {"license": "apache-2.0"}),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# no front matter\nlicense: mit", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\n- a list\n---\n", {}),
    ],
)
def test_licence_comes_from_the_source_card(tmp_path: Path, text: str, licence: dict[str, str]) -> None:
    assert read_licence(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_licence(tmp_path) == licence
