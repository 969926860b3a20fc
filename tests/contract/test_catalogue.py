"""Every catalogue id that a method covers runs as its printed recipe says, and is not its parent under another name."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lilliput import api, methods
from lilliput.cli import main as cli
from lilliput.methods import index as catalogue
from lilliput.progress import Quiet
from lilliput.recipe.load import load
from lilliput.verbs.gated import GateOptions

pytestmark = pytest.mark.slow

Tiny = Callable[[str], Path]
EXPERTS = ("expert-pruning", "task-expert-pruning")  # what only a model with experts runs
IDS = [key for key, method in catalogue.covering().items() if isinstance(method.spec.covers[key], list)]


def compress(model: Path, recipe: str, out: Path) -> str:
    """sha256 over all weights and adapters that the recipe writes, and how the folder stores its cache."""
    api.compress(
        model,
        out,
        recipe=recipe,
        samples=2,
        tokens=32,
        device="cpu",
        dtype="float32",
        eval_windows=0,
        settings=_shortened(recipe, out.with_suffix(".txt")),
        progress=Quiet(),
    )
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    entry = json.loads((out / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    digest.update(json.dumps(entry.get("caches")).encode())  # which change no weight
    return digest.hexdigest()


def _shortened(recipe: str, text: Path) -> list[str]:
    """A dozen steps of descent show that a fit runs, a few that a training does, and a few words which tokens stay."""
    text.write_text("Some words of one text.")
    out: list[str] = []
    for n, step in enumerate(load(recipe).steps):
        spec = methods.get(step.method).spec
        few = [f"{n}.steps=3", f"{n}.tokens=32"]
        gated = few if issubclass(spec.options, GateOptions) else []
        out += {"fit": [f"{n}.iters=12"], "train": few, "adapt": few, "edit": gated}.get(spec.verb, [])
        out += [f"{n}.text={text}"] if "text" in spec.options.model_fields else []
    return out


@pytest.fixture(scope="module")
def parents(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What each method writes by default, made once."""
    found: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in found:
            model = tiny("mixtral" if name in EXPERTS else "qwen2")
            found[name] = compress(model, name, tmp_path_factory.mktemp("parent") / "out")
        return found[name]

    return make


@pytest.mark.parametrize("key", IDS)
def test_the_recipe_runs_and_differs(
    tiny: Tiny,
    parents: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    key: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["lilliput", "methods", key, "--recipe"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    recipe = tmp_path / "r.yaml"
    recipe.write_text(capfd.readouterr().out, encoding="utf-8")
    method = catalogue.find(key)
    written = compress(tiny("mixtral" if key in EXPERTS else "qwen2"), str(recipe), tmp_path / "out")
    parent = method.name if key != method.name else method.spec.baseline
    if parent is not None:
        assert written != parents(parent)


def test_every_id_of_the_index_prints_or_explains(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ideas = [key for key, method in catalogue.covering().items() if not isinstance(method.spec.covers[key], list)]
    for key in ideas:
        monkeypatch.setattr(sys, "argv", ["lilliput", "methods", key, "--recipe"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert "read about it with `lilliput methods" in capfd.readouterr().err
