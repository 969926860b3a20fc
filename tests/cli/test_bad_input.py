"""What users get wrong, through the command line: one clear message, exit status 2, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lilliput import api
from lilliput.cli import main as cli

Tiny = Callable[[str], Path]
SHORT = ["--samples", "2", "--tokens", "32", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def lilliput(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit status, standard output, standard error."""

    def call(*line: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["lilliput", *map(str, line)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return call


@pytest.fixture
def refused(lilliput: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., str]:
    """Runs `compress`, holds it to the rules for a refusal, and gives its message."""

    def call(model: str | Path, *more: str | Path) -> str:
        place = tmp_path / "place"
        place.mkdir(exist_ok=True)
        code, out, err = lilliput("compress", model, "--out", place / "out", *SHORT, *more, "--json")
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        said = [x for x in err.splitlines() if x.startswith("error: ")]
        assert len(said) == 1, err
        assert err.strip().splitlines()[-1] == said[0]
        assert os.listdir(place) == []
        return said[0]

    return call


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A model that may be damaged."""
    return Path(shutil.copytree(tiny("qwen2"), tmp_path / "model"))


def recipe(folder: Path, *steps: dict[str, Any]) -> Path:
    path = folder / "r.yaml"
    path.write_text(json.dumps({"steps": list(steps)}))
    return path


# The source


def test_missing_model(refused: Callable[..., str], tmp_path: Path) -> None:
    said = refused(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in said


def test_folder_without_weights(refused: Callable[..., str], copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "safetensors" in refused(copy)


def test_missing_config(refused: Callable[..., str], copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "config.json" in refused(copy)


def test_truncated_shard(refused: Callable[..., str], copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    said = refused(copy)
    assert "model.safetensors" in said
    assert re.search("truncat|cut|short|incomplete|bytes", said)


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 4) + b"oops"])
def test_broken_header(refused: Callable[..., str], copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(copy)


def test_wrong_shape(refused: Callable[..., str], copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, copy / "model.safetensors", metadata={"format": "pt"})
    said = refused(copy)
    assert name in said
    assert "127" in said
    assert "128" in said


def test_missing_tensor(refused: Callable[..., str], copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert name in refused(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(refused: Callable[..., str], copy: Path, value: float) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    said = refused(copy)
    assert name in said
    assert "model.safetensors" in said


def test_pickles(refused: Callable[..., str], copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    said = refused(copy)
    assert "pytorch_model.bin" in said
    assert "save_pretrained" in said


# The recipe


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--recipe", "gptk"], ["gptk", "Did you mean 'gptq'?"]),
        (["--recipe", "w44"], ["w44", "Did you mean 'w4'?"]),
        (["--recipe", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--set", "gptq.act_ordr=true"], ["act_ordr", "Did you mean 'act_order'?"]),
        (["--set", "gptk.bits=3"], ["gptk", "Did you mean 'gptq'?"]),
        (["--set", "gptq.bits"], ["STEP.KEY=VALUE"]),
        (["--set", "gptq.bits=9"], ["bits", "8", "9"]),
        (["--set", "gptq.bits=1"], ["bits", "2", "1"]),
        (["--set", "gptq.bits=four"], ["bits", "four"]),
        (["--set", "gptq.damping=-1"], ["damping", "-1"]),
        (["--set", "gptq.group_size=0"], ["group_size", "at least one input", "tensor"]),
        (["--set", "gptq.group_size=-5"], ["group_size", "at least one input", "-5"]),
        (["--set", "gptq.group_size=4096"], ["4096", "128", "channel"]),
        (["--set", "gptq.group_size=129"], ["129", "128", "channel"]),
        (["--set", "gptq.include=nothing_is_called_so"], ["applies to no layer"]),
        (["--recipe", "wanda", "--set", "wanda.pattern=3:2"], ["pattern", "3:2"]),
        (["--recipe", "wanda", "--set", "wanda.pattern=2:7"], ["2:7", "width", "64"]),
        (["--recipe", "wanda", "--set", "wanda.sparsity=1.5"], ["sparsity", "1.5"]),
        (["--recipe", "wanda", "--set", "wanda.sparsity=1"], ["sparsity", "less than 1"]),
    ],
)
def test_recipes(refused: Callable[..., str], tiny: Tiny, more: list[str], words: list[str]) -> None:
    said = refused(tiny("qwen2"), *more)
    for word in words:
        assert word in said


GPTQ, RTN, AWQ, WANDA = ({"method": name} for name in ("gptq", "rtn", "awq", "wanda"))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([GPTQ, AWQ], "move it to the front"),
        ([GPTQ, WANDA], "prune first"),
        ([GPTQ, GPTQ], "quantizes this layer already"),
        ([RTN, GPTQ], "quantizes this layer already"),
        ([WANDA, WANDA], "prunes this layer already"),
        ([{"method": "dsnot"}], "no step before it prunes this layer"),
        ([{"method": "admm-update"}, WANDA], "no step before it prunes this layer"),
        ([WANDA, GPTQ, {"method": "dsnot"}], "put it before that step"),
        ([WANDA, {"method": "dsnot", "target": {"sparsity": 0.7}}], "leave the target of this step out"),
        ([WANDA, AWQ, GPTQ], "move it to the front"),
        ([GPTQ, {"method": "owl"}], "must come before"),
        ([{"method": "owl"}], "only divides a budget"),
    ],
)
def test_orders(
    refused: Callable[..., str], tiny: Tiny, tmp_path: Path, steps: list[dict[str, Any]], reason: str
) -> None:
    assert reason in refused(tiny("qwen2"), "--recipe", recipe(tmp_path, *steps))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [", ["r.yaml"]),
        ("- method: gptq", ["r.yaml", "steps"]),
        ("steps: []", ["r.yaml", "steps"]),
        ("steps:\n  - method: gptq\n    target: {bit: 4}", ["line 3", "Did you mean 'bits'?"]),
        ("steps:\n  - methd: gptq", ["line 2", "method"]),
        ("steps:\n  - method: gptq\n    options: {act_order: perhaps}", ["act_order", "perhaps"]),
    ],
)
def test_recipe_files(refused: Callable[..., str], tiny: Tiny, tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    said = refused(tiny("qwen2"), "--recipe", path)
    for word in words:
        assert word in said


# The data


@pytest.mark.parametrize(("content", "word"), [("", "empty"), ("too short", "token"), (None, "text.txt")])
def test_text(refused: Callable[..., str], tiny: Tiny, tmp_path: Path, content: str | None, word: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    said = refused(tiny("qwen2"), "--data", path)
    assert word in said
    assert "text.txt" in said


def test_rows_that_are_not_rows(refused: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n')
    said = refused(tiny("qwen2"), "--data", path)
    assert "rows.jsonl" in said
    assert "2" in said


def test_unknown_data(refused: Callable[..., str], tiny: Tiny) -> None:
    assert "dcos" in refused(tiny("qwen2"), "--data", "dcos")


def test_more_tokens_than_positions(refused: Callable[..., str], tiny: Tiny) -> None:
    assert "256" in refused(tiny("qwen2"), "--tokens", "257")


# Budgets and machines


def test_size(refused: Callable[..., str], lilliput: Callable[..., tuple[int, str, str]], tiny: Tiny) -> None:
    code, out, _ = lilliput("plan", tiny("qwen2"), *SHORT, "--json")
    assert code == 0
    need = json.loads(out)["folder_bytes"]
    said = refused(tiny("qwen2"), "--recipe", "w4-engines", "--size", str(need - 1234))
    assert "1234 bytes" in said
    assert lilliput("plan", tiny("qwen2"), *SHORT, "--recipe", "w4-engines", "--size", str(need))[0] == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--size", "20kB"], ["20.00kB", "the smallest that this menu makes is", "files beside the weights"]),
        (["--size", "1GB"], ["1.00GB", "more than the model itself takes"]),
        (["--size", "0"], ["--size", "0"]),
        (["--size", "3XB"], ["3XB", "400MB"]),
        (["--size", "400kB", "--bits", "3"], ["contradict"]),
        (["--bits", "0"], ["--bits 0", "3.5"]),
        (["--bits", "1.2"], ["--bits 1.2", "smallest entries"]),
        (["--bits", "3", "--recipe", "gptq"], ["--bits", "--recipe"]),
        (["--menu", "native", "--recipe", "gptq"], ["--menu", "--recipe"]),
        (["--menu", "native"], ["give --size, --bits or --decode-time"]),
        (["--decode-time", "2ms"], ["names no device", "2ms@h100"]),
        (["--decode-time", "2 hours@h100"], ["2 hours", "12ms"]),
        (["--decode-time", "2ms@h1000"], ["h1000", "Did you mean 'h100'"]),
        (["--decode-time", "0.001us@h100"], ["too short", "is predicted to take"]),
        (["--decode-time", "2ms@h100", "--bits", "3"], ["contradict"]),
        (["--decode-time", "2ms@h100", "--recipe", "gptq"], ["--decode-time", "--recipe"]),
        (["--bits", "4", "--menu", "natif"], ["natif", "Did you mean 'native'"]),
        (["--bits", "4", "--context", "100"], ["--context", "--bits", "--size"]),
        (["--size", "1MB", "--context", "9999"], ["--context 9999", "256 positions"]),
        (["--bits", "4", "--menu", "int4/64/odd"], ["odd", "int4/64/asym"]),
        (["--bits", "4", "--menu", "int9/64"], ["int9"]),
        (["--bits", "4", "--menu", "int4/64,int4/64"], ["twice"]),
    ],
)
def test_goals(refused: Callable[..., str], tiny: Tiny, more: list[str], words: list[str]) -> None:
    said = refused(tiny("qwen2"), *more)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--frontier", "--size", "1MB"], ["--frontier", "--size"]),
        (["--frontier", "--recipe", "gptq"], ["--frontier", "--recipe"]),
        (["--frontier", "--fit-blocks"], ["--frontier", "--fit-blocks"]),
        (["--html", "page.html"], ["--frontier"]),
    ],
)
def test_frontiers(
    lilliput: Callable[..., tuple[int, str, str]], tiny: Tiny, more: list[str], words: list[str]
) -> None:
    code, out, err = lilliput("plan", tiny("qwen2"), *SHORT, *more, "--json")
    assert (code, out) == (2, "")
    assert all(word in err for word in words)


def test_memory(
    refused: Callable[..., str], lilliput: Callable[..., tuple[int, str, str]], tiny: Tiny, tmp_path: Path
) -> None:
    said = refused(tiny("qwen2"), "--memory", "1MB")
    found = re.search(r"give --memory (\S+) or more", said)
    assert found is not None
    code, out, err = lilliput(
        "compress", tiny("qwen2"), "--out", tmp_path / "out", *SHORT, "--memory", found[1], "--json"
    )
    assert code == 0, err
    assert json.loads(out)["measured"]["perplexity"]["value"] > 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dtype", "float8"], ["float8", "bfloat16"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--device", "cpu:x"], ["cpu:x"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--memory", "much"], ["--memory", "much"]),
        (["--memory", "0"], ["--memory", "0"]),
        (["--size", "-3MB"], ["--size", "-3MB"]),
    ],
)
def test_values(refused: Callable[..., str], tiny: Tiny, more: list[str], words: list[str]) -> None:
    said = refused(tiny("qwen2"), *more)
    for word in words:
        assert word in said


@pytest.mark.parametrize("more", [["--samples", "0"], ["--tokens", "1"], ["--seed", "x"], ["--nonsense"]])
def test_arguments(lilliput: Callable[..., tuple[int, str, str]], tiny: Tiny, tmp_path: Path, more: list[str]) -> None:
    code, out, err = lilliput("compress", tiny("qwen2"), "--out", tmp_path / "out", *more, "--json")
    assert code == 2
    assert out == ""
    assert more[0] in err
    assert os.listdir(tmp_path) == []


def test_no_place_for_the_output(lilliput: Callable[..., tuple[int, str, str]], tiny: Tiny, tmp_path: Path) -> None:
    code, out, err = lilliput("compress", tiny("qwen2"), "--out", tmp_path / "no" / "out", *SHORT, "--json")
    assert code == 2
    assert out == ""
    assert "does not exist" in err
    assert os.listdir(tmp_path) == []


# Hard, but not wrong


@pytest.mark.parametrize("group", ["auto", "48"])
def test_fewer_tokens_than_inputs(
    lilliput: Callable[..., tuple[int, str, str]], tiny: Tiny, tmp_path: Path, group: str
) -> None:
    """9 tokens for Gram matrices of 64 and 128 inputs, and a group that does not divide them."""
    out = tmp_path / "out"
    line = ["--samples", "1", "--tokens", "9", "--device", "cpu", "--set", f"gptq.group_size={group}"]
    code, text, err = lilliput("compress", tiny("qwen2"), "--out", out, *line, "--json")
    assert code == 0, err
    report = json.loads(text)
    assert all(0 <= row["error"] < 1 for row in report["rows"])
    assert 0 < report["measured"]["perplexity"]["value"] < 1e9
    code, text, _ = lilliput("verify", out, "--json")
    assert code == 0
    assert json.loads(text)["problems"] == []
    logits = api.load(out)(input_ids=torch.arange(8).unsqueeze(0)).logits
    assert bool(torch.isfinite(logits).all())


def test_verify_ends_with_2_on_a_damaged_folder(
    lilliput: Callable[..., tuple[int, str, str]], tiny: Tiny, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert lilliput("compress", tiny("qwen2"), "--out", out, "--recipe", "magnitude", *SHORT)[0] == 0
    shard = sorted(out.glob("*.safetensors"))[-1]
    raw = bytearray(shard.read_bytes())
    raw[-7] ^= 0x20
    shard.write_bytes(raw)
    code, text, err = lilliput("verify", out, "--json")
    assert code == 2
    found = json.loads(text)
    assert not found["whole"]
    assert any(shard.name in x for x in found["problems"])
    assert "Traceback" not in err
    code, text, _ = lilliput("verify", out)
    assert code == 2
    assert shard.name in text
    code, text, err = lilliput("verify", tmp_path / "nothing", "--json")
    assert code == 2
    assert text == ""
    assert "nothing" in err
