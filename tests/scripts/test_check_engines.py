"""The committed table of what vLLM loads has all cases, and the page shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture
def check(script: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "1")  # the script sets defaults for its process, not for the tests'
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


def test_a_finding_is_about_the_tokens_that_were_chosen(check: ModuleType, tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    exact = torch.randn(check.PROMPT + check.NEW - 1, 32).log_softmax(-1)
    chosen = exact.argmax(-1).tolist()
    monkeypatch.setattr(check, "written", lambda case, place: tmp_path)
    monkeypatch.setattr(check, "scored", lambda *_: exact)
    seen = exact.gather(1, torch.tensor(chosen).unsqueeze(1))[:, 0]
    case = check.cases()["native: nf4"]
    monkeypatch.setattr(check, "continued", lambda *_: ([0, *chosen], seen))
    assert check.measure(case) == {"finding": "equal", "apart": 0.0, "rounding": 0.0, "same": check.NEW}
    monkeypatch.setattr(check, "continued", lambda *_: ([0, *chosen[:-1], (chosen[-1] + 1) % 32], seen))
    other = check.measure(case)
    assert (other["finding"], other["same"]) == ("differs", check.NEW - 1)

    def broken(*_: object) -> None:
        raise RuntimeError("outer") from ValueError("inner\nmore")

    monkeypatch.setattr(check, "continued", broken)
    assert check.measure(case) == {"finding": "fails", "why": "ValueError: inner"}
