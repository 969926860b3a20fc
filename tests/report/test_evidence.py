import io
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate
from rich.console import Console
from typer.testing import CliRunner

import lilliput
from lilliput import report
from lilliput.cli.main import app
from lilliput.errors import DataError, SourceError
from lilliput.model import stored as model
from lilliput.options import Gates, Parts, Text
from lilliput.report import sections, terminal
from lilliput.report.evidence import gather
from lilliput.report.page import render
from lilliput.source import open_source

pytestmark = pytest.mark.slow

TEXT = Text(windows=2, tokens=48)
SCHEMA = json.loads((Path(report.__file__).parent / "schema.json").read_text())


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its 4-bit self."""
    base = Path(str(tiny("llama")))
    out = tmp_path_factory.mktemp("evidence") / "w4"
    lilliput.compress(base, out, recipe="gptq", samples=4, tokens=64, eval_windows=0)
    return out, base


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout


def test_all_parts_make_one_valid_object_and_a_page(pair: tuple[Path, Path], tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text(
        "".join(json.dumps({"context": "a b", "choices": ["c", "d"], "label": i % 2}) + "\n" for i in range(6))
    )
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"turns": [f"Explain {x}."]}) + "\n" for x in ("names", "values", "classes")))
    evaluation, evidence = gather(
        *pair,
        text=Text(windows=3, tokens=48),
        parts=Parts((f"mine={items}", f"instructions={asked}"), limit=6, prompts=2, where=True, roofline=True),
        gates=Gates(max_kl=100.0),
    )
    validate(evidence, SCHEMA)
    assert evidence["quality"]["data"][0]["kl"] == evaluation.kl.to_json()
    assert evidence["recipe"]["steps"][0]["method"] == "gptq"
    assert evidence["gates"][0]["passed"]
    assert evidence["tasks"][0]["items"] == 6
    assert evidence["loss"]["suspects"] == []
    assert len(evidence["loss"]["blocks"]) == len({row["block"] for row in evidence["loss"]["linears"]})
    assert evidence["size"]["bytes"] == evaluation.bytes
    assert evidence["quality"]["generation"]["prompts"] == 2
    assert [x["prompts"] for x in evidence["quality"]["instructions"]] == [3]
    assert [x["name"] for x in evidence["tasks"]] == ["mine"]
    assert all(sections._PLACE.match(row["sentence"]) for row in evidence["roofline"]["rows"])
    assert {row["name"] for row in evidence["tensors"]} >= {"model.norm.weight"}
    page = render(json.loads(json.dumps(evidence)))
    assert "<svg" in page
    assert "Answers to instructions" in page
    assert "a proxy for a judge" in page
    console = Console(width=200, file=io.StringIO())
    console.print(terminal.evaluation(evidence))
    assert "win rate, a proxy" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_every_model_is_opened_once(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(name: str, **options: Any) -> Any:
        opened.append(name)
        return open_source(name, **options)

    monkeypatch.setattr(model, "open_source", counted)
    names = [str(x) for x in pair]
    for where in (False, True):
        opened.clear()
        gather(*pair, text=TEXT, parts=Parts(prompts=2, where=where))
        assert opened == names


def test_a_compression_carries_what_its_plan_noted(tiny, tmp_path: Path) -> None:
    done = lilliput.compress(tiny("gpt2"), tmp_path / "w4", recipe="rtn", tokens=64, eval_windows=2)
    assert done.plan.notes
    assert done.evaluation is not None
    assert done.evidence is not None
    assert done.evidence["notes"] == [*done.plan.notes, *done.evaluation.notes]
    validate(done.evidence, SCHEMA)


def test_what_a_pruned_model_need_not_multiply_is_counted(tiny, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, out = str(tiny("llama")), tmp_path / "half"
    lilliput.compress(base, out, recipe="magnitude", settings=["magnitude.pattern=2:4"], tokens=64, eval_windows=0)
    sizes = [gather(x, base, text=TEXT)[1]["size"] for x in (out, pair[0])]
    shapes = [x.shape for name, x in open_source(base).stored.items() if "_proj" in name]
    linears = sum(rows * width for rows, width in shapes)
    assert sizes[0]["macs_saved"] == linears // 2
    assert sizes[1]["macs_saved"] is None


def test_a_missed_limit_is_exit_status_3(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out, base = map(str, pair)
    page = tmp_path / "report.html"
    shared = ["eval", out, "--against", base, "--windows", "3", "--tokens", "48", "--json"]
    code, answer = run(*shared, "--max-kl", "1e-9", "--html", str(page))
    assert code == 3
    found = json.loads(answer)
    validate(found, SCHEMA)
    assert found["gates"][0]["passed"] is False
    assert found["verdict"]["level"] == "bad"
    assert found["suspects"] == []
    assert found["kl"] == found["quality"]["data"][0]["kl"]
    assert page.read_text().startswith("<!doctype html>") or page.read_text().startswith("<!DOCTYPE html>")
    assert run(*shared, "--max-kl", "100")[0] == 0


def test_models_are_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out, base = map(str, pair)
    saved = tmp_path / "one.json"
    code, answer = run("eval", out, "--against", base, "--windows", "3", "--tokens", "48", "--json")
    assert code == 0
    saved.write_text(answer)
    page = tmp_path / "compare.html"
    shared = ["--against", base, "--windows", "3", "--tokens", "48", "--html", str(page)]
    code, answer = run("compare", str(saved), base, *shared, "--json")
    assert code == 0
    rows = json.loads(answer)["models"]
    assert len(rows) == 2
    assert rows[1]["perplexity_ratio"]["value"] == 1.0
    assert "<svg" in page.read_text()
    code, answer = run("compare", str(saved), base, *shared)
    assert code == 0
    assert "w4" in answer


def test_sizes_and_bit_widths_need_no_original(pair: tuple[Path, Path], tiny, tmp_path: Path) -> None:
    out, base = map(str, pair)
    page = tmp_path / "scaling.html"
    shared = ["--windows", "2", "--tokens", "32", "--html", str(page)]
    code, answer = run("compare", "--scaling", out, base, str(tiny("wide")), *shared, "--json")
    assert code == 0
    rows = json.loads(answer)["models"]
    assert [row["bits"] for row in rows] == [4, 32, 32]
    assert rows[0]["total_bits"] < rows[1]["total_bits"] < rows[2]["total_bits"]
    assert rows[0]["best_loss"]
    assert "4 bits" in page.read_text()
    done = CliRunner().invoke(app, ["compare", "--scaling", out, base, "--against", base])
    assert done.exit_code == 2
    assert "leave out --against" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-kl", "0.1"], "--against"),
        (["--against", "BASE", "--html", "/nowhere/x.html"], "does not exist"),
        (["--against", "BASE", "--tasks", "mine=/nowhere.jsonl"], "nowhere.jsonl"),
        (["--against", "BASE", "--tasks", "instructions=/nowhere.jsonl"], "nowhere.jsonl"),
        (["--against", "BASE", "--tasks", "instructions"], "give instructions=FILE.jsonl"),
        (["--tasks", "instructions:mine=FILE"], "give the original with --against"),
        (["--judge", "http://localhost/v1"], "both --judge and --judge-model"),
        (["--judge", "http://localhost/v1", "--judge-model", "m"], "--tasks instructions=FILE"),
    ],
)
def test_bad_input_is_one_message(pair: tuple[Path, Path], arguments: list[str], words: str) -> None:
    out, base = map(str, pair)
    given = [base if x == "BASE" else x for x in arguments]
    done = CliRunner().invoke(app, ["eval", out, *given, "--windows", "3", "--tokens", "48"])
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_later_part_that_fails_leaves_the_earlier_ones(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*a: Any, **k: Any) -> Any:
        raise SourceError("no clock")

    monkeypatch.setattr("lilliput.efficiency.measure_speed", fail)
    line = ["eval", str(pair[0]), "--against", str(pair[1]), "--windows", "2", "--tokens", "32", "--speed", "--json"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2
    assert "error: speed: no clock" in done.stderr
    found = json.loads(done.stdout)
    assert found["failed"] == {"speed": "no clock"}
    assert "speed" not in found
    assert found["quality"]["data"][0]["kl"]
    assert any("no clock" in note for note in found["notes"])
    validate({k: v for k, v in found.items() if k in SCHEMA["properties"]}, SCHEMA)


def test_tasks_are_looked_at_before_anything_is_measured(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lilliput.report.evidence.evaluate", None)
    with pytest.raises(DataError, match="no file"):
        gather(*pair, parts=Parts((f"mine={tmp_path / 'none.jsonl'}",)))
