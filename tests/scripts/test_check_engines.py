"""The committed table of what vLLM loads has all cases, and the page shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def check(script: Callable[..., ModuleType]) -> ModuleType:
    return script("check_engines")


def test_the_record_has_every_case(check: ModuleType) -> None:
    record = json.loads(check.RECORD.read_text(encoding="utf-8"))
    assert [row["name"] for row in record["cases"]] == list(check.cases())
    assert f"{check.BEGIN}\n{check.table(record)}\n{check.END}" in check.PAGE.read_text(encoding="utf-8")


def test_every_native_folder_is_served_equally(check: ModuleType) -> None:
    record = json.loads(check.RECORD.read_text(encoding="utf-8"))
    native = [row for row in record["cases"] if row["layout"] == "lilliput"]
    assert len(native) > 5
    assert {row["finding"] for row in native} == {"equal"}


def test_a_finding_is_about_the_tokens_that_were_chosen(check, monkeypatch, tmp_path) -> None:
    torch.manual_seed(0)
    exact = torch.randn(check.PROMPT + check.NEW - 1, 32).log_softmax(-1)
    tokens = [0, *exact.argmax(-1).tolist()]
    monkeypatch.setattr(check, "scored", lambda *_: exact)
    scores = exact.gather(1, torch.tensor(tokens[1:]).unsqueeze(1))[:, 0].tolist()
    same = check.judged(tmp_path, {"tokens": tokens, "scores": scores}, "float32")
    assert same == {"finding": "equal", "apart": 0.0, "rounding": 0.0, "same": check.NEW}
    tokens[-1] = (tokens[-1] + 1) % 32
    other = check.judged(tmp_path, {"tokens": tokens, "scores": scores}, "float32")
    assert (other["finding"], other["same"]) == ("differs", check.NEW - 1)
    assert check.judged(tmp_path, {"why": "no"}, "float32") == {"finding": "fails", "why": "no"}


def test_rounding_excuses_as_much_again_and_no_more(check, monkeypatch, tmp_path) -> None:
    exact = torch.zeros(check.PROMPT + check.NEW - 1, 2).log_softmax(-1)
    off = 0.01
    monkeypatch.setattr(check, "scored", lambda _, __, dtype: exact if dtype == torch.float32 else exact + off)
    answer = {"tokens": [0] * (len(exact) + 1), "scores": (exact[:, 0] - 1.9 * off).tolist()}
    assert check.judged(tmp_path, answer, "bfloat16")["finding"] == "equal"
    assert check.judged(tmp_path, answer, "float32")["finding"] == "differs"
    answer["scores"] = (exact[:, 0] - 2.1 * off).tolist()
    assert check.judged(tmp_path, answer, "bfloat16")["finding"] == "differs"


def test_an_engine_that_leaves_inputs_as_they_are_is_seen(check, monkeypatch, tmp_path) -> None:
    torch.manual_seed(0)
    length, off = check.PROMPT + check.NEW - 1, 0.01
    rounded, kept = (torch.randn(length, 4).log_softmax(-1) for _ in range(2))
    without = tmp_path / "without"

    def scored(folder: Path, _: object, dtype: torch.dtype) -> torch.Tensor:
        return (kept if folder == without else rounded) + (0.0 if dtype == torch.float32 else off)

    monkeypatch.setattr(check, "scored", scored)
    for apart, finding in ((1.2 * off, "inputs as they are"), (1.3 * off, "differs")):
        answer = {"tokens": [0] * (length + 1), "scores": (kept[:, 0] - apart).tolist()}
        told = check.judged(tmp_path, answer, "bfloat16", (without, "inputs as they are"))
        assert told["finding"] == finding
    exact = {"tokens": [0] * (length + 1), "scores": rounded[:, 0].tolist()}
    assert check.judged(tmp_path, exact, "bfloat16", (without, "inputs as they are"))["finding"] == "equal"


def test_a_folder_without_its_rounding_of_inputs(check, tmp_path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    group = {"targets": ["Linear"], "weights": {}, "input_activations": {"num_bits": 8}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"config_groups": {"group_0": group}}}))
    other, kept = check.plain(folder)
    assert kept == "inputs as they are"
    (left,) = json.loads((other / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert "input_activations" not in left
    assert check.plain(other) is None


def test_a_folder_without_its_compressed_cache(check, tmp_path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    how = {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": how}))
    other, kept = check.plain(folder)
    assert kept == "cache as it is"
    assert json.loads((other / "config.json").read_text()) == {"model_type": "llama"}


def test_what_ends_the_engine_is_a_finding_and_the_others_go_on(check, monkeypatch, tmp_path) -> None:
    engine = tmp_path / "engine"
    engine.write_text("""#!/bin/sh
shift 2
for folder in "$@"; do [ "$folder" = float16=bad ] && exit 7; echo '{"tokens": [1]}'; done
""")
    engine.chmod(0o755)
    folders = [Path("a"), Path("bad"), Path("c")]
    found = check.continued(folders, ["float16"] * 3, str(engine))
    assert found == {x: {"tokens": [1]} for x in folders} | {Path("bad"): {"why": "vLLM's process ended with status 7"}}
    assert check.first_line(RuntimeError("outer\nmore")) == "RuntimeError: outer"
