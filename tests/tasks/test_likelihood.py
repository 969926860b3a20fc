from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lilliput.errors import DataError, SourceError
from lilliput.tasks import likelihood
from lilliput.tasks.answers import AnswerStore
from lilliput.tasks.likelihood import Encoded, Loaded, encode, log_likelihoods
from lilliput.tasks.run import loaded

REQUESTS = [
    ("The assignment statement", " binds names"),
    ("The assignment statement", " to objects in the current namespace"),
    ("A", " class definition is an executable statement. It first evaluates the list"),
    ("Is this true? Answer:", " yes"),
    ("Is this true? Answer:", " no"),
    ("", "Names refer to objects"),
    ("trailing space ", "moves"),
]


def manual(model: Loaded, context: str, continuation: str) -> tuple[float, bool]:
    """One request by itself, token by token, in float64."""
    tokenizer = model.tokenizer
    stripped = context.rstrip()
    whole = tokenizer(context + continuation)["input_ids"]
    before = tokenizer(stripped)["input_ids"] if stripped else [tokenizer.eos_token_id]
    whole = whole if stripped else before + whole
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([whole])).logits[0].double()
    total, greedy = 0.0, True
    for i in range(len(before), len(whole)):
        p = torch.softmax(logits[i - 1], dim=-1)
        total += float(torch.log(p[whole[i]]))
        greedy = greedy and int(p.argmax()) == whole[i]
    return total, greedy


def test_scores_equal_a_manual_computation(llama):
    found = log_likelihoods(replace(llama, answers=AnswerStore()), REQUESTS)
    for request, score in zip(REQUESTS, found, strict=True):
        value, greedy = manual(llama, *request)
        assert score.value == pytest.approx(value, rel=1e-5)
        assert score.greedy == greedy


def test_the_models_own_first_choice_is_greedy(llama):
    ids = llama.tokenizer("The assignment statement")["input_ids"]
    with torch.no_grad():
        best = int(llama.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    (right, wrong) = likelihood.scores(llama, [Encoded(tuple(ids), (best,)), Encoded(tuple(ids), (best - 1,))])
    assert right.greedy
    assert not wrong.greedy
    assert right.value > wrong.value


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_batches_do_not_change_scores(tiny, name, monkeypatch):
    with loaded(tiny(name)) as model:
        together = log_likelihoods(model, REQUESTS)
        monkeypatch.setattr(likelihood, "TOKENS", 1)
        alone = log_likelihoods(replace(model, answers=AnswerStore()), REQUESTS)
    assert [x.value for x in alone] == pytest.approx([x.value for x in together], rel=1e-5)


def test_requests_that_differ_in_the_last_token_share_a_pass(llama, monkeypatch):
    passes = []
    real = likelihood.tail_logits

    def counted(loaded, inputs, first):
        passes.extend(inputs)
        return real(loaded, inputs, first)

    monkeypatch.setattr(likelihood, "tail_logits", counted)
    likelihood.scores(replace(llama, answers=AnswerStore()), [Encoded((5, 6, 7), (x,)) for x in range(20, 30)])
    assert passes == [(5, 6, 7)]


def test_context_and_continuation_are_cut_as_the_harness_cuts_them(llama):
    tokenizer = llama.tokenizer
    found = encode(tokenizer, "trailing space ", "moves", 256)
    assert tokenizer.decode(found.targets) == " moves"
    assert tokenizer.decode([*found.inputs, found.targets[-1]]) == "trailing space moves"
    empty = encode(tokenizer, "", "Names", 256)
    assert empty.inputs[0] == tokenizer.eos_token_id


def test_what_is_too_long_loses_its_left(llama):
    tokenizer = llama.tokenizer
    long = encode(tokenizer, "statement " * 300, "binds names", 16)
    assert len(long.inputs) == 16
    assert tokenizer.decode(long.targets) == " binds names"
    with pytest.raises(DataError, match="longer than the model's 4 positions"):
        encode(tokenizer, "a", " statement of many words that does not fit", 4)
    with pytest.raises(DataError, match="no token of its own"):
        encode(tokenizer, "a", "", 16)


def test_a_model_that_is_not_finite_is_named_with_its_module(tiny: Callable[[str], Path]):
    with loaded(tiny("llama")) as model:
        with torch.no_grad():
            model.model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
        with pytest.raises(SourceError, match=r"model\.layers\.2\.mlp\.up_proj is the first module"):
            log_likelihoods(model, REQUESTS[:1])
