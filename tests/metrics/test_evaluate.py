import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, LlamaConfig, PhiConfig

from lilliput.anatomy.skeleton import Skeleton
from lilliput.data import load_tokens
from lilliput.errors import DataError, PlanError, SourceError
from lilliput.metrics import evaluate as room
from lilliput.metrics import slices
from lilliput.metrics.evaluate import evaluate, evaluate_all
from lilliput.streaming import walk

WINDOWS, TOKENS = 3, 48


def run(model, against=None, **other):
    return evaluate(model, against, **({"windows": WINDOWS, "tokens": TOKENS} | other))


def loss(folder, text):
    """Mean loss as transformers computes it, window by window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = load_tokens(text, AutoTokenizer.from_pretrained(folder), samples=WINDOWS, tokens=TOKENS).ids
    with torch.no_grad():
        return sum(float(model(row[None], labels=row[None]).loss) for row in ids) / WINDOWS


def gemma():
    return Gemma2Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=3.0,
    )


def phi():
    return PhiConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def gpt2():
    return GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=128)


def bias(model):
    model.lm_head.bias.copy_(torch.linspace(-2, 2, 256))


@pytest.mark.parametrize(
    ("config", "change"),
    [(lambda: None, None), (gemma, None), (phi, bias), (gpt2, None)],
    ids=["llama", "capped logits, tied", "biased head", "gpt2"],
)
@pytest.mark.parametrize(("columns", "tile"), [(256, 256), (100, 37)])
def test_perplexity_is_what_transformers_computes(folder, text, config, change, columns, tile, monkeypatch):
    monkeypatch.setattr(slices, "choose", lambda *_: slices.Slices(2, columns, tile, 0))
    path = folder("model", config(), change=change)
    found = run(path, data=text)
    assert math.log(found.perplexity.value) == pytest.approx(loss(path, text), abs=1e-5)
    assert found.perplexity.value > 5
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(folder, text):
    path = folder("uniform", change=lambda model: model.lm_head.weight.zero_())
    found = run(path, data=text)
    assert found.perplexity.value == pytest.approx(256, rel=1e-6)


def test_a_model_against_itself(folder, text):
    path = folder("model")
    found = run(path, path, data=text)
    assert found.perplexity_ratio == room.Interval(1.0, 1.0, 1.0)
    assert found.kl == room.Interval(0.0, 0.0, 0.0)
    assert found.agreement == room.Interval(1.0, 1.0, 1.0)
    assert found.perplexity == found.reference_perplexity


def noise(size):
    def change(model):
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += size * parameter.std() * torch.randn(parameter.shape, generator=generator)

    return change


def test_against_the_original_everything_is_paired(folder, text):
    original, near, far = folder("a"), folder("b", change=noise(0.03)), folder("c", change=noise(0.5))
    small, large = run(near, original, data=text), run(far, original, data=text)
    assert 0 < small.kl.value < large.kl.value
    assert 1 > small.agreement.value > large.agreement.value
    alone, other = run(near, data=text), run(original, data=text)
    assert small.perplexity == alone.perplexity
    assert small.reference_perplexity == other.perplexity
    assert small.perplexity_ratio.value == pytest.approx(alone.perplexity.value / other.perplexity.value)

    ours, theirs = (AutoModelForCausalLM.from_pretrained(x).eval() for x in (near, original))
    ids = load_tokens(text, AutoTokenizer.from_pretrained(near), samples=WINDOWS, tokens=TOKENS).ids
    with torch.no_grad():
        p = torch.log_softmax(ours(ids).logits[:, :-1].double(), -1)
        q = torch.log_softmax(theirs(ids).logits[:, :-1].double(), -1)
    assert small.kl.value == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), abs=1e-6)
    assert small.agreement.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_json_has_the_promised_keys(folder, text):
    path = folder("model")
    found = json.loads(json.dumps(run(path, path, data=text).to_json(), allow_nan=False))
    for key in ("perplexity", "perplexity_ratio", "kl", "agreement"):
        assert set(found[key]) == {"value", "low", "high"}
    assert found["bytes"] == (path / "model.safetensors").stat().st_size
    assert found["bits_per_weight"] == 32
    assert found["seconds"] > 0
    assert found["peak_rss_bytes"] > 0
    assert (found["windows"], found["tokens"], found["dtype"]) == (WINDOWS, TOKENS, "float32")
    assert found["data"] == str(text)
    assert len(found["fingerprint"]) == 64
    alone = run(path, data=text).to_json()
    assert alone["kl"] is None
    assert alone["against"] is None


def test_bfloat16_is_near_and_said(folder, text):
    path = folder("model")
    full, half = run(path, data=text), run(path, data=text, dtype="bfloat16")
    assert half.perplexity.value == pytest.approx(full.perplexity.value, rel=0.1)
    assert half.perplexity.value != full.perplexity.value
    assert any("bfloat16" in x for x in half.notes)
    opened = run(room.open_model(str(path), dtype=torch.bfloat16), data=text)
    assert (opened.perplexity, opened.dtype, opened.notes) == (half.perplexity, "bfloat16", half.notes)


def test_text_that_was_calibrated_on_is_noted(folder, text):
    path = folder("model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    seen = load_tokens(text, tokenizer, samples=4, tokens=64)
    other = load_tokens("docs:reference", tokenizer, samples=4, tokens=64)
    assert any("calibrated on" in x for x in run(path, data=text, calibration=seen).notes)
    assert not any("calibrated on" in x for x in run(path, data=text, calibration=other).notes)


def test_the_layout_follows_the_budget(folder, text):
    wide = LlamaConfig.from_pretrained(folder("model"))
    wide.vocab_size = 5_000
    path = folder("wide", wide)
    model = room.open_model(str(path))
    loose = slices.choose([model, model], 64, 10**9)
    assert (loose.batch, loose.columns, loose.tile) == (16, 5_000, 4_096)
    tight = slices.choose([model, model], 64, int((slices.ram.BASE + 1_500_000) * slices.ram.SLACK))
    assert tight.batch < 16
    assert tight.tile <= tight.columns < 4_096
    assert tight.bytes <= 1_500_000 < loose.bytes

    with pytest.raises(
        PlanError, match=r"--memory .* is too small to evaluate: give --memory (.*)MB or more"
    ) as caught:
        run(path, path, data=text, memory=50_000_000)
    enough = int(float(str(caught.value).split("give --memory ")[1].split("MB")[0]) * 1e6)
    run(path, path, data=text, memory=enough)


def test_no_slice_of_a_large_head_is_longer_than_it_need_be(folder):
    wide = LlamaConfig.from_pretrained(folder("model"))
    wide.vocab_size = 1 << 20
    model = SimpleNamespace(
        skeleton=Skeleton(wide), source=SimpleNamespace(text_config=wide), dtype=lambda name: torch.float32
    )
    shape = slices.choose([model, model], 64, 10**12)
    assert shape.columns % shape.tile == 0
    assert 4 * shape.columns * wide.hidden_size <= slices.SLICE


def test_nothing_is_left_behind(folder, text, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    run(folder("model"), data=text, work=work)
    assert list(work.iterdir()) == []

    def poison(model):
        model.model.embed_tokens.weight[:] = math.nan

    with pytest.raises(SourceError, match="not finite, first in window 0 at token 0"):
        run(folder("bad", change=poison), data=text, work=work)
    assert list(work.iterdir()) == []


def test_models_that_cannot_be_compared(folder, text):
    first = folder("first")
    wider = LlamaConfig.from_pretrained(first)
    wider.vocab_size = 300
    with pytest.raises(DataError, match="300 and 256 vocabulary entries"):
        run(folder("wider", wider), first, data=text)
    with pytest.raises(DataError, match="different vocabularies"):
        run(folder("other", first="x"), first, data=text)


def test_bad_requests(folder, text):
    path = folder("model")
    with pytest.raises(DataError, match="needs 2 windows"):
        run(path, data=text, windows=1)
    with pytest.raises(DataError, match="needs 2 tokens"):
        run(path, data=text, tokens=1)
    with pytest.raises(DataError, match="more than the 128 positions"):
        run(path, data=text, tokens=129)
    with pytest.raises(PlanError, match="unknown dtype 'int8'"):
        run(path, data=text, dtype="int8")
    with pytest.raises(DataError, match="tokens are needed"):
        run(path, data=text, windows=4_000)
    with pytest.raises(SourceError):
        run(path.parent / "absent", data=text)


def test_several_texts_are_measured_as_each_by_itself(folder, text, tmp_path):
    path, other = folder("model"), folder("other", seed=1)
    second = tmp_path / "second.txt"
    second.write_text(text.read_text()[400:])
    both = run(path, other, data=[text, second], detail=True)
    for at, source in enumerate((text, second)):
        alone = run(path, other, data=source, detail=True)
        assert both.texts[at] == alone.texts[0]
    assert both.perplexity == both.texts[0].perplexity
    plain = both.to_json()
    assert [x["data"] for x in plain["texts"]] == [str(text), str(second)]
    assert plain["kl"] == plain["texts"][0]["kl"]
    assert 0 < both.texts[0].kl_p95.value <= both.texts[0].kl_p99.value
    assert both.texts[0].classes
    assert both.texts[0].worst[0]["kl"] >= both.texts[0].kl_p99.value
    assert 0 <= both.texts[0].flips.value <= 1 - both.agreement.value


def test_several_models_are_measured_as_each_by_itself(folder, text, monkeypatch):
    """Two share the original's head, the third has one of its own, so both ways are taken."""
    base = folder("base")
    shifted = [folder(name, change=lambda m, f=f: _scale_down(m, f)) for name, f in (("a", 0.9), ("b", 1.2))]
    other = folder("c", change=lambda model: model.lm_head.weight.mul_(1.1))
    passes = []
    monkeypatch.setattr(
        room, "last_hidden", lambda m, *a, **k: passes.append(m.source.model) or walk.last_hidden(m, *a, **k)
    )
    together = evaluate_all([shifted[0], other, shifted[1]], base, data=text, windows=WINDOWS, tokens=TOKENS)
    assert passes.count(str(base)) == 1
    for path, found in zip([shifted[0], other, shifted[1]], together, strict=True):
        alone = run(path, base, data=text)
        assert found.model == alone.model
        assert found.texts == alone.texts


def test_a_broken_model_is_named_among_others(folder, text):
    base, broken = folder("base"), folder("broken", change=lambda m: m.model.norm.weight.fill_(math.inf))
    with pytest.raises(SourceError, match="broken"):
        evaluate_all([folder("sound", change=lambda m: _scale_down(m, 0.9)), broken], base, data=text, windows=2)


def _scale_down(model, factor):
    model.model.layers[0].mlp.down_proj.weight.mul_(factor)


def test_strided_windows_score_their_last_tokens(folder, text):
    path = folder("model")
    found = run(path, data=text, stride=16).texts[0]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    long = load_tokens(text, AutoTokenizer.from_pretrained(path), samples=1, tokens=TOKENS + 2 * 16).ids[0]
    losses = []
    for n in range(WINDOWS):
        row = long[16 * n : 16 * n + TOKENS]
        with torch.no_grad():
            logits = model(row[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[-17:-1], row[-16:]))
    assert math.log(found.perplexity.value) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert found.stride == 16
    with pytest.raises(DataError, match="stride"):
        run(path, data=text, stride=TOKENS + 1)


def test_windows_are_as_long_as_all_models_can_read(folder, text):
    short = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96,
    )  # fmt: skip
    found = run(folder("model"), folder("short", short), data=text, windows=2, tokens=None)
    assert found.texts[0].tokens == 96
    assert run(folder("learned", gpt2()), data=text, windows=2, tokens=None).texts[0].tokens == 128
