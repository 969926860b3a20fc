"""The command line against a recorded api: what it passes on, what it prints where, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lilliput
from lilliput.cli import main as cli
from lilliput.errors import PlanError, SourceError

REPORT = {
    "predicted": {"bytes": 100_000_000, "peak_rss_bytes": 400_000_000, "seconds": 90.0},
    "measured": {
        "bytes": 100_000_123,
        "peak_rss_bytes": 390_000_000,
        "seconds": 95.5,
        "perplexity_ratio": {"value": 1.052, "low": 1.047, "high": 1.058},
    },
    "recipe": {"name": "w4", "steps": [{"method": "awq"}, {"method": "gptq"}]},
    "blocks_skipped": 3,
    "notes": ["calibration and evaluation overlap"],
    "rows": [{"name": "a"}],
}


class Recorder:
    """Stands in for lilliput.api: keeps the call, chatters on standard output, answers or raises."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            print("a library's remark")
            os.write(1, b"a C library's remark\n")
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

        return call


def reporting(data: dict[str, Any]) -> Any:
    return SimpleNamespace(to_json=lambda: data)


def run(monkeypatch: pytest.MonkeyPatch, answer: Any, *args: str) -> tuple[int, Recorder]:
    api = Recorder(answer)
    monkeypatch.setattr(lilliput, "api", api, raising=False)
    monkeypatch.setattr(sys, "argv", ["lilliput", *args])
    with pytest.raises(SystemExit) as end:
        cli.main()
    code = end.value.code
    assert code is None or isinstance(code, int)
    return code or 0, api


def test_compress_passes_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "compress m --out d --recipe w3 --data t.txt --samples 4 --tokens 64 --memory 4GB --size 400MB --dtype float32 "
        "--device cpu --work w --set gptq.bits=3 --set gptq.act_order=true --seed 7 --json"
    )
    code, api = run(monkeypatch, reporting(REPORT), *line.split())
    assert code == 0
    name, args, options = api.calls[0]
    progress = options.pop("progress")
    assert callable(progress.step)
    assert (name, args) == ("compress", ("m", Path("d")))
    assert options == {
        "recipe": "w3",
        "data": "t.txt",
        "samples": 4,
        "tokens": 64,
        "memory": 4_000_000_000,
        "size": 400_000_000,
        "bits": None,
        "decode_time": None,
        "context": None,
        "menu": (),
        "fit_blocks": False,
        "teacher": None,
        "dtype": "float32",
        "device": "cpu",
        "work": Path("w"),
        "seed": 7,
        "settings": ("gptq.bits=3", "gptq.act_order=true"),
        "to": None,
        "eval_data": None,
        "eval_windows": 8,
    }


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    _, api = run(monkeypatch, reporting(REPORT), "plan", "m")
    _, _, options = api.calls[0]
    assert options == {
        "recipe": None,
        "data": "docs",
        "samples": 128,
        "tokens": 512,
        "memory": None,
        "size": None,
        "bits": None,
        "decode_time": None,
        "context": None,
        "menu": (),
        "fit_blocks": False,
        "teacher": None,
        "dtype": "auto",
        "device": "auto",
        "work": None,
        "seed": None,
        "settings": (),
        "to": None,
    }


@pytest.mark.parametrize(
    ("line", "called"),
    [
        ("plan m --recipe gptq", ("plan", ("m",))),
        ("verify d", ("verify", (Path("d"),))),
        ("inspect m --data docs", ("inspect", ("m",))),
    ],
)
def test_json_is_one_object_and_alone_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str, called: tuple[Any, ...]
) -> None:
    code, api = run(monkeypatch, reporting({"seconds": 1.5, "worst": float("nan")}), *line.split(), "--json")
    out, err = capfd.readouterr()
    assert code == 0
    assert api.calls[0][:2] == called
    assert json.loads(out) == {"seconds": 1.5, "worst": None}
    assert "a library's remark" in err
    assert "a C library's remark" in err


def test_tables_are_readable_without_colour(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, reporting(REPORT), "compress", "m", "--out", "d")
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert "remark" not in out
    assert "1.052 [1.047, 1.058]" in out
    assert "note: calibration and evaluation overlap" in out
    assert "w4: awq then gptq" in out
    size = next(x for x in out.splitlines() if x.strip().startswith("size"))
    assert size.split() == ["size", "100.0", "MB", "100.0", "MB"]


def test_generate_prints_the_text_alone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, api = run(monkeypatch, "and they lived", "generate", "m", "Once", "--max-new-tokens", "5")
    assert code == 0
    assert api.calls == [("generate", ("m", "Once"), {"max_new_tokens": 5})]
    assert capfd.readouterr().out == "and they lived\n"


@pytest.mark.parametrize("error", [PlanError("no method 'gptk'. Did you mean 'gptq'?"), SourceError("no folder m")])
def test_user_errors_are_one_message_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    code, _ = run(monkeypatch, error, "compress", "m", "--out", "d", "--json")
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1] == f"error: {error}"
    assert "Traceback" not in err


def test_full_disk_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "d/model.safetensors")
    code, _ = run(monkeypatch, full, "compress", "m", "--out", "d")
    last = capfd.readouterr().err.splitlines()[-1]
    assert code == 2
    assert "d/model.safetensors" in last
    assert "run the same command again" in last


def test_interrupt_says_how_to_resume(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, _ = run(monkeypatch, KeyboardInterrupt(), "compress", "m", "--out", "d")
    assert code == 130
    assert "Run the same command again" in capfd.readouterr().err
    code, _ = run(monkeypatch, KeyboardInterrupt(), "inspect", "m")
    assert code == 130
    assert "again" not in capfd.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lilliput, "api", Recorder(ZeroDivisionError("bug")), raising=False)
    monkeypatch.setattr(sys, "argv", ["lilliput", "verify", "d"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    "line", ["compress m", "plan m --memory much", "plan m --samples 0", "fly m", "eval m --windows x"]
)
def test_bad_arguments_end_with_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], line: str
) -> None:
    code, api = run(monkeypatch, reporting({}), *line.split())
    assert code == 2
    assert api.calls == []
    assert capfd.readouterr().out == ""


def test_methods_lists_and_prints_recipes(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, None, "methods", "--json")
    entries = json.loads(capfd.readouterr().out)
    assert "rtn" in {entry["name"] for entry in entries}
    run(monkeypatch, None, "methods")
    assert "rtn" in capfd.readouterr().out
    run(monkeypatch, None, "methods", "rtn")
    page = capfd.readouterr().out
    assert page.startswith("# rtn\n")
    assert "## Options" in page
    code, _ = run(monkeypatch, None, "methods", "rtnn")
    assert code == 2
    assert "Did you mean 'rtn'?" in capfd.readouterr().err
    code, _ = run(monkeypatch, None, "methods", "--recipe")
    assert code == 2


def test_a_printed_recipe_can_be_used(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from lilliput.recipe.load import load

    run(monkeypatch, None, "methods", "gptq", "--recipe")
    file = tmp_path / "r.yaml"
    file.write_text(capfd.readouterr().out)
    assert load(file).steps == load("gptq").steps


def test_help_names_every_command() -> None:
    script = "from lilliput.cli import main; main.main()"
    ended = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for command in ("compress", "plan", "eval", "verify", "methods", "inspect", "generate"):
        assert f" {command} " in ended.stdout


def test_a_mask_is_recorded_and_says_how_it_is_used(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["mask", "d", "code", "--data", "code.txt", "--keep", "0.5"]
    code, api = run(monkeypatch, Path("d/masks/code.json"), *line)
    assert code == 0
    assert api.calls == [("record_mask", (Path("d"), "code", "code.txt"), {"windows": 8, "tokens": None, "keep": 0.5})]
    assert "use_mask(lilliput.load('d'), 'code')" in " ".join(capfd.readouterr().out.split())
    code, _ = run(monkeypatch, Path("d/masks/code.json"), *line, "--json")
    assert json.loads(capfd.readouterr().out) == {"mask": "d/masks/code.json"}
    assert run(monkeypatch, None, "mask", "d", "code")[0] == 2  # without text
