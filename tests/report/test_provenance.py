"""lilliput.json is read back as written, refused when damaged or newer, and hashes are those of the bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lilliput.errors import SourceError
from lilliput.export.provenance import NAME, LinearRow, Provenance, read, sha256

SMALL = Provenance("m", "f", "dense", {}, "p", 1, None, {})


def test_round_trip(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    (tmp_path / NAME).write_text(SMALL.to_json())
    assert read(tmp_path) == SMALL
    assert SMALL.to_json() == SMALL.to_json()


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 1}', json.dumps({"schema": 1})])
def test_damaged_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(SourceError, match="damaged"):
        read(tmp_path)


def test_newer_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps(json.loads(SMALL.to_json()) | {"schema": 2}))
    with pytest.raises(SourceError, match="schema 2"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_hash_is_that_of_the_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lilliput.export.provenance._HASHED", 16)
    tensor = torch.arange(35).view(5, 7).to(dtype)
    raw = tensor.T.contiguous().view(torch.uint8).numpy().tobytes()
    assert sha256(tensor.T) == hashlib.sha256(raw).hexdigest()
    assert sha256(torch.zeros(0)) == hashlib.sha256(b"").hexdigest()
    assert sha256(torch.tensor(1.0)) == hashlib.sha256(torch.ones(1).numpy().tobytes()).hexdigest()


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    row = LinearRow("a", "a", "dense", 4.0, error=float("nan"))
    made = replace(SMALL, measured={"kl": {"value": float("inf"), "low": 1.0}}, linears=(row,))
    (tmp_path / NAME).write_text(made.to_json())
    found = read(tmp_path)
    assert found is not None
    assert found.measured == {"kl": {"value": None, "low": 1.0}}
    assert found.linears[0].error is None
