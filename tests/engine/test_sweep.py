"""Every causal language model of transformers, tiny: compressed or refused, never wrong; and as the page says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@pytest.fixture(scope="module")
def sweep(script: Callable[..., ModuleType]) -> ModuleType:
    return script("sweep_architectures")


@pytest.mark.sweep
@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_nothing_is_wrong(sweep: ModuleType, tmp_path: Path, name: str) -> None:
    row = sweep.sweep(name, tmp_path)
    assert [x for x in row.results if x.kind == "wrong"] == []
    written = sweep.PAGE.read_text(encoding="utf-8") if sweep.PAGE.exists() else ""
    # Another version may well do something else, and what cannot be made may lack a package.
    if f"of transformers {transformers.__version__} " in written and not row.unmade:
        assert sweep.line(row) in written.splitlines()


def test_the_sweep_sees_what_is_wrong(sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the engine and our reader decode differently, and a compression that ends in a traceback."""
    monkeypatch.setattr(sweep, "RECIPES", {"rtn": ("rtn", sweep.QUICK)})
    assert [x.kind for x in sweep.sweep("llama", tmp_path / "right").results] == ["compressed"]
    whole = sweep.own

    def other(folder: Path) -> object:
        model = whole(folder)
        model.model.layers[1].mlp.up_proj.weight.data[0] *= 1.5
        return model

    monkeypatch.setattr(sweep, "own", other)
    (found,) = sweep.sweep("llama", tmp_path / "apart").results
    assert (found.kind, found.message[:10]) == ("wrong", "logits are")

    def broken(*_: object, **__: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(sweep.api, "compress", broken)
    (found,) = sweep.sweep("llama", tmp_path / "broken").results
    assert (found.kind, found.message) == ("wrong", "compress ended with KeyError: 'gone'")


def test_names_of_fields_make_a_config_small(sweep: ModuleType) -> None:
    config = sweep.tiny("gemma3")
    assert config.text_config.hidden_size == 64
    assert config.vision_config.num_hidden_layers == 2
    assert config.text_config.vocab_size == sweep.VOCABULARY
