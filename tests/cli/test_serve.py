"""`lilliput serve` prints the engine's command, or becomes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lilliput.cli.main import app
from lilliput.engines import serve


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(serve, "installed", lambda: serve.Installed(llama_cpp=("/bin/llama-server", "--model")))
    path = tmp_path / "a model.gguf"
    path.touch()
    return path


def test_the_command_is_printed_for_a_shell(file: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(file), "--port", "81", "--dry-run", "--", "--n_ctx", "64"])
    assert done.exit_code == 0
    assert done.stdout == f"/bin/llama-server --model '{file}' --host 127.0.0.1 --port 81 --n_ctx 64\n"
    done = CliRunner().invoke(app, ["serve", str(file), "--dry-run", "--json"])
    assert json.loads(done.stdout)["engine"] == "llama.cpp"


def test_the_process_becomes_the_engine(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(os, "execv", lambda *told: started.append(told))
    assert CliRunner().invoke(app, ["serve", str(file)]).exit_code == 0
    [(program, line)] = started
    assert program == line[0] == "/bin/llama-server"
    assert line[-4:] == ("--host", "127.0.0.1", "--port", "8000")


def test_an_engine_that_is_missing_is_an_error_of_the_user(file: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(file.parent), "--engine", "vlm"])
    assert done.exit_code == 2
    assert "Did you mean 'vllm'" in done.stderr
    assert CliRunner().invoke(app, ["serve", str(file), "--port", "0"]).exit_code == 2
