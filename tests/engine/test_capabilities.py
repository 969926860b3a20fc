"""The committed table is what the installed transformers does, and the exporter refuses exactly what does not load."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from lilliput.export.compressed_tensors import CompressedTensors

pytestmark = pytest.mark.slow

CHECKED = ("5.22.2", "5.23.0", "5.24.0")
OLDEST = "5.18.0"  # with compressed-tensors 0.17, which takes other words for codes of these bits
OTHERWISE = (3, 5, 6, 7)


def rows(capabilities: ModuleType) -> dict[str, dict[str, str]]:
    table: dict[str, Any] = capabilities.read_table()
    return {json.dumps(row["case"]): row["transformers"] for row in table["cases"]}


def versions(found: dict[str, str]) -> tuple[str, ...]:
    """Those in which a case was measured: the later ones alone for cases that came later."""
    return tuple(x for x in CHECKED if x in found)


def test_the_table_has_every_case_and_version(capabilities: ModuleType) -> None:
    known = rows(capabilities)
    assert [json.dumps(asdict(case)) for case in capabilities.cases()] == list(known)
    assert all({CHECKED[-1], OLDEST} <= set(found) for found in known.values())
    assert sum(versions(found) == CHECKED for found in known.values()) > 80


def test_the_exporter_refuses_exactly_what_some_version_does_not_load(capabilities: ModuleType) -> None:
    known = rows(capabilities)
    wrong = []
    for case in capabilities.cases():
        config = capabilities.CONFIGS[case.model]()
        model = capabilities.stored_weights(case, config)
        reason = CompressedTensors().refuse(capabilities.outcomes(case, model), config)
        found = known[json.dumps(asdict(case))]
        loads = all(found[v] in ("exact", "tolerance") for v in versions(found))
        if loads != (reason is None):
            wrong.append((case, reason))
        if reason is not None:
            assert "Nearest:" in reason
    assert wrong == []


def test_the_oldest_loads_what_the_others_do_but_for_packings_of_later_releases(capabilities: ModuleType) -> None:
    known = rows(capabilities)
    lost = []
    for case in capabilities.cases():
        found = known[json.dumps(asdict(case))]
        if all(found[v] in ("exact", "tolerance") for v in versions(found)) and found[OLDEST].startswith("fails"):
            lost.append(case)

    blocks = [case for case in lost if case.kind in ("NVFP4", "MXFP4", "MXFP8")]
    assert {case.dtype for case in blocks} == {"float32"}  # it does not decode linears while it loads
    assert {case.bits for case in lost if case not in blocks} == set(OTHERWISE)


@pytest.mark.parametrize("part", range(4))
def test_the_installed_version_does_what_the_table_says(capabilities: ModuleType, part: int) -> None:
    """A version without a column: what the newest one with a column does."""
    column = transformers.__version__ if transformers.__version__ in (*CHECKED, OLDEST) else CHECKED[-1]
    known = rows(capabilities)
    for case in list(capabilities.cases())[part::4]:
        expected = known[json.dumps(asdict(case))][column]
        if expected.startswith("fails"):
            continue  # refused by the plan; the script measures these too
        assert capabilities.measure(case) == expected, case


def test_a_broken_grid_is_seen(capabilities: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CompressedTensors.pack

    def broken(self: CompressedTensors, outcome: Any, layer: Any) -> dict[str, torch.Tensor]:
        return {n: t * 2 if n.endswith("scale") else t for n, t in whole(self, outcome, layer).items()}

    monkeypatch.setattr(CompressedTensors, "pack", broken)
    assert capabilities.measure(next(capabilities.cases())) == "fails: wrong logits"
