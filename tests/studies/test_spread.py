"""A recipe on several draws of calibration text."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lilliput import api
from lilliput.cli.main import app
from lilliput.errors import DataError, PlanError
from lilliput.options import Calibration, Text
from lilliput.progress import Quiet
from lilliput.studies import spread as study
from lilliput.studies.spread import spread

SEEDS = (5, 1, 2)
SHARED: dict[str, Any] = {
    "seeds": SEEDS,
    "recipe": "gptq",
    "settings": ("gptq.bits=3",),
    "calibration": Calibration(samples=4, tokens=64),
    "text": Text(windows=2, tokens=64),
    "progress": Quiet(),
}


def run(seed: int, ratio: float, half: float) -> dict[str, Any]:
    interval = {"value": ratio, "low": ratio - half, "high": ratio + half}
    return {"seed": seed, **dict.fromkeys(study.FIGURES, interval)}


def test_figures_over_runs_by_hand() -> None:
    found = study._over("kl", [run(0, 1.0, 0.1), run(1, 2.0, 0.2), run(2, 4.0, 0.6)])
    assert found.mean.value == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(statistics.stdev([1.0, 2.0, 4.0]))
    assert (found.least, found.most, found.text) == (1.0, 4.0, pytest.approx(0.3))
    half = 4.302652729749 * found.deviation / 3**0.5
    assert (found.mean.low, found.mean.high) == pytest.approx((7 / 3 - half, 7 / 3 + half))


def test_a_folder_belongs_to_one_study(tmp_path: Path) -> None:
    study._begin(tmp_path / "a", {"samples": 4, "text": {"data": ("x",)}})
    study._begin(tmp_path / "a", {"samples": 4, "text": {"data": ("x",)}})
    with pytest.raises(PlanError, match="another samples: choose"):
        study._begin(tmp_path / "a", {"samples": 5, "text": {"data": ("x",)}})
    with pytest.raises(PlanError, match="does not exist"):
        study._begin(tmp_path / "no" / "where", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(PlanError, match="holds no such runs"):
        study._begin(tmp_path / "full", {})


def test_what_shows_no_spread_is_refused_before_any_work(tiny: Any, tmp_path: Path) -> None:
    base, out = tiny("llama"), tmp_path / "out"
    with pytest.raises(PlanError, match=r"--seeds 0,1: .* 3 seeds"):
        spread(base, out, **{**SHARED, "seeds": (0, 1)})
    with pytest.raises(PlanError, match="all different"):
        spread(base, out, **{**SHARED, "seeds": (0, 1, 1)})
    with pytest.raises(DataError, match="one window"):
        spread(base, out, **{**SHARED, "text": Text(windows=1)})
    with pytest.raises(PlanError, match="reads calibration text"):
        spread(base, out, **{**SHARED, "recipe": "rtn", "settings": ("rtn.importance=false",)})
    assert not out.exists()


def test_slips_on_the_command_line() -> None:
    line = ["spread", "MODEL", "--out", "OUT"]
    for more, said in ((["--seeds", "1,x,2"], "whole numbers"), (["--seed", "1"], "not --seed")):
        done = CliRunner().invoke(app, [*line, *more])
        assert done.exit_code == 2
        assert said in done.stderr


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, study.Spread]:
    out = tmp_path_factory.mktemp("spread") / "gptq"
    return out, spread(tiny("llama"), out, **SHARED)


def _copied(out: Path, place: Path, *without: str) -> Path:
    place.mkdir()
    for file in out.iterdir():
        if file.name not in without:
            (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.slow
def test_every_seed_draws_other_samples(finished: tuple[Path, study.Spread]) -> None:
    out, found = finished
    assert [x["seed"] for x in found.runs] == list(SEEDS)
    assert len({x["perplexity_ratio"]["value"] for x in found.runs}) == 3
    assert sorted(x.name for x in out.iterdir()) == ["seed-1.json", "seed-2.json", "seed-5.json", "settings.json"]
    json.dumps(found.to_json())


@pytest.mark.slow
def test_a_repeated_study_goes_on_at_the_seed_that_lacks(
    finished: tuple[Path, study.Spread], tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = finished
    copy = _copied(out, tmp_path / "copy", "seed-2.json")
    kept, ran = api.compress, []

    def counted(*given: Any, **more: Any) -> Any:
        ran.append(more["seed"])
        return kept(*given, **more)

    monkeypatch.setattr(api, "compress", counted)
    assert spread(tiny("llama"), copy, **SHARED, keep=True) == found
    assert ran == [2]
    assert (copy / "seed-2" / "config.json").exists()
    # Compressed, and killed before it was measured.
    (copy / "seed-2.json").unlink()
    assert spread(tiny("llama"), copy, **SHARED) == found
    assert ran == [2]
    assert not (copy / "seed-2").exists()


@pytest.mark.slow
def test_a_broken_record_is_named(finished: tuple[Path, study.Spread], tiny: Any, tmp_path: Path) -> None:
    copy = _copied(finished[0], tmp_path / "copy")
    (copy / "seed-1.json").write_text("{")
    with pytest.raises(DataError, match=r"seed-1\.json is no record"):
        spread(tiny("llama"), copy, **SHARED)


@pytest.mark.slow
def test_the_command(tiny: Any, tmp_path: Path) -> None:
    line = ["spread", str(tiny("llama")), "--out", str(tmp_path / "out"), "--recipe", "gptq", "--set", "gptq.bits=3"]
    line += ["--seeds", "5, 1,2", "--samples", "2", "--tokens", "32", "--eval-windows", "2"]
    done = CliRunner().invoke(app, [*line, "--json"])
    assert done.exit_code == 0, done.stderr
    assert [x["name"] for x in json.loads(done.stdout)["figures"]] == list(study.FIGURES)
    done = CliRunner().invoke(app, line)
    assert "spread over calibration seeds" in done.stdout
    assert "deviation" in done.stdout
