"""Every metric says what it is, how it is run, and what of the literature it covers."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from lilliput.cli.main import app
from lilliput.errors import DataError
from lilliput.metrics.metric import Metric
from lilliput.studies import index

IDS = json.loads((Path(__file__).parent / "ids.json").read_text(encoding="utf-8"))
SCHEMA = json.loads((Path(index.__file__).parents[1] / "report" / "schema.json").read_text(encoding="utf-8"))


def test_every_id_of_the_literature_is_covered_and_none_is_invented() -> None:
    assert sorted({key for x in index.discover().values() for key in x.metric.covers}) == sorted(IDS)


@pytest.mark.parametrize("name", index.discover())
def test_the_command_that_runs_it_is_one(name: str) -> None:
    words = index.discover()[name].metric.how.split()
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert words[0] == "lilliput"
    assert [word for word in words if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize("name", index.discover())
def test_its_answer_is_in_the_documented_evidence(name: str) -> None:
    metric = index.discover()[name].metric
    if not metric.how.startswith("lilliput eval"):
        return
    for key in metric.key.split(","):
        node = SCHEMA
        for part in key.strip().split("."):
            node = node["properties"][part.removesuffix("[]")]
            node = node["items"] if part.endswith("[]") else node
            node = SCHEMA["$defs"][node["$ref"].split("/")[-1]] if "$ref" in node else node


def test_entries_are_plain_data_and_pages_say_how() -> None:
    entries = json.loads(json.dumps(index.index()))
    assert [x["name"] for x in entries] == sorted(x["name"] for x in entries)
    perplexity = next(x for x in entries if x["name"] == "perplexity")
    assert (perplexity["room"], perplexity["covers"]) == ("metrics", ["perplexity"])
    page = index.page(index.find("perplexity")[0])
    assert page.startswith("# perplexity\n\nPerplexity: exp of the mean")
    assert re.search(r"- run: `lilliput eval DIR .*--data wikitext2", page)


def test_a_name_an_id_and_a_slip() -> None:
    assert [x.name for x in index.find("perplexity_ratio")] == ["perplexity-ratio"]
    assert {x.name for x in index.find("reasoning-tasks")} >= {"choice", "generate"}
    with pytest.raises(DataError, match=r"'perplexty'.*perplexity"):
        index.find("perplexty")


def test_what_is_no_metric_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lilliput.metrics import kl

    with pytest.raises(TypeError, match="cover"):
        Metric(how="", key="", unit="", interval="", cover=("kl",))  # type: ignore[call-arg]
    monkeypatch.setattr(kl, "METRIC", types.SimpleNamespace())
    index.discover.cache_clear()
    with pytest.raises(RuntimeError, match=r"metrics\.kl"):
        index.discover()
    index.discover.cache_clear()


def test_the_command_lists_and_shows() -> None:
    def run(*line: str) -> Any:
        return CliRunner().invoke(app, ["metrics", *line])

    assert "perplexity-ratio" in run().stdout
    assert [x["name"] for x in json.loads(run("mfu", "--json").stdout)] == ["speed"]
    assert "# speed" in run("latency").stdout
    assert run("nothing-like-it").exit_code == 2
