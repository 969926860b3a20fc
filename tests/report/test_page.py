"""The page: one file, every part, nothing that a model's name could smuggle in."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import lilliput.report
from lilliput.errors import LilliputError
from lilliput.report.page import render

_SECTIONS = ["recipe", "size", "quality", "speed", "roofline", "loss", "tensors", "provenance", "notes"]


class Page(HTMLParser):
    """Elements with their attributes, and whether all that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_every_section_in_its_order_and_every_figure_with_its_data(rendered: str) -> None:
    text = rendered
    page = Page(text)
    assert [x["id"] for x in page.all("section")] == _SECTIONS
    drawn = [x for x in page.all("div") if x.get("class") == "drawn"]
    assert len(drawn) == 9
    assert all(x["role"] == "img" and x["aria-label"] for x in drawn)
    assert len(page.all("figcaption")) == len(drawn)
    assert text.count("Data of this figure") == len(drawn)
    assert len(page.all("svg")) == 2 * len(drawn)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    words = " ".join(page.words)
    for said in ("▼ LOSS", "1.052", "88.4 %", "2.31× smaller", "no detectable loss", "1.31×", "Aarhus"):
        assert said in words, said


def test_it_asks_for_nothing_and_takes_its_colours_from_the_page(rendered: str) -> None:
    text = rendered
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "#0a0b" not in text
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#ffffff"}  # of a clip that is not painted
    used, known = set(re.findall(r"var\(--([\w-]+)\)", text)), set(re.findall(r"--([\w-]+):", text))
    assert used <= known


def test_equal_evidence_gives_equal_bytes(sample: dict[str, Any], rendered: str) -> None:
    assert render(json.loads(json.dumps(sample))) == rendered


def test_parts_that_are_absent_are_left_out(sample: dict[str, Any]) -> None:
    for key in (*_SECTIONS[:2], "speed", "tensors"):
        sample[key] = None
    del sample["roofline"], sample["loss"], sample["notes"], sample["tasks"], sample["quality"]["classes"]
    page = Page(render(sample))
    assert [x["id"] for x in page.all("section")] == ["quality", "provenance"]
    assert Page(render({"schema": 1})).all("section") == []


@pytest.mark.parametrize("part", ["size", "quality", "speed", "loss", "recipe"])
def test_a_part_without_anything_in_it(sample: dict[str, Any], part: str) -> None:
    page = Page(render({"schema": 1, part: dict.fromkeys(sample[part])}))
    assert page.all("figure") == []


def test_names_cannot_become_markup(sample: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>\" onload='x' <!-- $x^2$ \x07 模型 --> ]]>"
    sample["title"] = sample["model"] = sample["against"] = evil
    sample["verdict"]["headline"] = sample["verdict"]["reasons"][0] = evil
    sample["recipe"]["text"] = sample["recipe"]["steps"][0]["method"] = evil
    sample["quality"]["data"][0]["name"] = sample["quality"]["classes"][0]["name"] = evil
    sample["quality"]["worst"][0]["token"] = sample["quality"]["generation"]["examples"][0]["ours"] = evil
    sample["tasks"][0]["name"] = sample["roofline"]["rows"][0]["device"] = evil
    sample["size"]["by_kind"][0]["kind"] = sample["tensors"][0]["name"] = evil
    sample["loss"]["linears"][0]["role"] = sample["loss"]["linears"][0]["name"] = evil
    sample["loss"]["suspects"] = [{"tensor": evil, "reason": evil, "factor": 2.0}]
    sample["provenance"] = {evil: {evil: [evil]}}
    page = Page(render(sample))
    assert len(page.all("script")) == 1
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    assert page.words.count(evil) > 10
    assert any("damaged" in word.lower() for word in page.words)


@pytest.mark.slow
def test_thirty_blocks_stay_below_a_megabyte(sample: dict[str, Any]) -> None:
    linears = sample["loss"]["linears"]
    sample["loss"]["linears"] = [{**x, "block": b} for b in range(30) for x in linears[:7]]
    sample["loss"]["blocks"] = [{"block": b, "share": 1 / 30} for b in range(30)]
    sample["tensors"] = [{**x, "name": f"{x['name']}.{b}"} for b in range(30) for x in sample["tensors"][:23]]
    sample["tasks"] = sample["speed"] = sample["roofline"] = None
    text = render(sample)
    assert len(text.encode()) < 700_000
    assert text.count("<title>block 29") == 2 * 8  # tips of seven linears and of the block, in both widths


def test_long_lists_are_cut_and_say_so(sample: dict[str, Any]) -> None:
    assert "5 more rows are in the JSON." in render({"schema": 1, "tensors": sample["tensors"][:1] * 3005})


def test_experts_of_one_role_share_a_cell(sample: dict[str, Any]) -> None:
    one = sample["loss"]["linears"][0]
    experts = [{**one, "role": "expert", "share": share} for share in (0.1, 0.25)]
    assert "block 0, expert: 35 %" in render({"schema": 1, "loss": {"linears": experts}})


def test_the_sample_follows_the_schema(sample: dict[str, Any]) -> None:
    schema = json.loads((Path(lilliput.report.__file__).parent / "schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(sample, schema)
    sample["size"]["bytes"] = "3 MB"
    with pytest.raises(jsonschema.ValidationError, match="3 MB"):
        jsonschema.validate(sample, schema)


def test_the_documentation_names_every_key_of_the_schema() -> None:
    folder = Path(lilliput.report.__file__).parent
    schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
    said = set(re.findall(r"`(\w+)`", (folder.parents[2] / "docs" / "report.md").read_text(encoding="utf-8")))
    for name, part in schema["properties"].items():
        keys = {name, *part.get("properties", {}), *part.get("items", {}).get("properties", {})}
        assert keys <= said, keys - said


def test_missing_libraries_are_named_with_the_remedy(sample: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LilliputError, match=r"needs matplotlib.*pip install 'lilliput\[report\]'"):
        render(sample)


def test_what_holds_of_several_predictions_is_said_once(sample: dict[str, Any]) -> None:
    row = sample["roofline"]["rows"][0]
    effect = "prefill is bound by arithmetic: 4-bit weights will not make it faster."

    def prediction(device: str, context: int, speedup: float) -> dict[str, Any]:
        said = f"On a {device} at batch 1 and {context:,} tokens {effect}"
        return row | {"device": device, "phase": "prefill", "context": context, "speedup": speedup, "sentence": said}

    slow = [prediction("one", 512, 1.0), prediction("one", 4096, 1.01), prediction("two", 4096, 1.0)]
    sample["roofline"]["rows"] = [*slow, prediction("two", 512, 1.5)]
    said = "Prefill is bound by arithmetic: 4-bit weights will not make it faster (one, two in 1 of 2)."
    assert render(sample).count(said) == 1
