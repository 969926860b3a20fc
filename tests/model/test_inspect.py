"""`lilliput inspect`'s data."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lilliput.model.inspect import describe, outliers
from lilliput.model.stored import open_model
from lilliput.runtime.load import load
from lilliput.stats import fold


def test_description_is_json_and_counts_every_parameter(tiny: Any) -> None:
    model = open_model(str(tiny("mixtral")))
    data = json.loads(json.dumps(describe(model.anatomy(), model.skeleton.shapes)))
    real = sum(p.numel() for p in load(tiny("mixtral")).parameters())
    assert data["parameters"]["total"] == real
    assert data["parameters"]["router"] == 2 * 4 * 64
    assert data["parameters"]["gate"] == data["parameters"]["down"] == 2 * 4 * 64 * 64
    assert data["parameters"]["embedding"] == data["parameters"]["head"] == 512 * 64
    assert [k["blocks"] for k in data["kinds"]] == [[0, 1]]
    kind = data["kinds"][0]
    assert kind["groups"] == {"head": 2, "channel": 4 * 64, "expert": 4}
    assert all(link["error"] <= 1e-5 for link in kind["links"])


def test_outliers_name_the_loud_channel() -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    x[:, 11] *= 50
    state = fold.update(fold.init(16, ["absmax", "square"]), x)
    (row,) = outliers({"a": state}, top=2)
    assert row["channels"][0]["channel"] == 11
    assert row["absmax"] == pytest.approx(float(x.abs().max()))
    assert row["rms"] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    assert row["ratio"] == pytest.approx(row["absmax"] / row["rms"])
    assert len(row["channels"]) == 2


def test_outliers_of_a_silent_site_have_no_ratio() -> None:
    state = fold.update(fold.init(4, ["absmax", "square"]), torch.zeros(3, 4))
    assert outliers({"a": state})[0]["ratio"] == 0.0
